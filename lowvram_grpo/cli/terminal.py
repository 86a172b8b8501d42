"""What commands do before their work, and how chat and eval speak to a person beside what they print."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from lowvram_grpo.run.capture import Screen


def prepare_cuda() -> str | None:
    """What has to be settled before CUDA starts: the allocator, and one card of several. Returns a sentence for people
    where there was a choice."""
    from lowvram_grpo.memory.devices import growing_segments, pin_card

    growing_segments()
    return pin_card()


def stderr_console() -> tuple[Console, Callable[[str], None]]:
    """A console on stderr, so that stdout holds nothing but answers, and what prints a sentence for a person on it."""
    console = Console(file=Screen(sys.stderr, "stderr"), highlight=False)
    return console, lambda text: console.print(escape(text), style="dim", soft_wrap=not console.is_terminal)
