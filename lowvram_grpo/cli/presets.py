"""`lowvram-grpo presets`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lowvram_grpo.errors import UserError
from lowvram_grpo.run.quiet import hush


def presets(
    words: Annotated[list[str] | None, typer.Argument(metavar="[[show] NAME]", help="Show this one whole.")] = None,
) -> None:
    """List the presets, or show one with its ladder."""
    start(words or [])


def start(words: Sequence[str]) -> None:
    """List all presets, or show one: `NAME` or `show NAME`.

    Raises:
        UserError: `show` without a name, more than one name, or an unknown one.
    """
    words = list(words)
    shown = bool(words) and words[0] == "show"
    rest = words[1:] if shown else words
    if len(rest) > 1 or (shown and not rest):
        raise UserError("Name one preset, as in `lowvram-grpo presets show 8gb`; without a name all are listed.")
    hush()
    console = Console(highlight=False)
    if rest:
        _show(console, rest[0])
    else:
        _list(console)


def _list(console: Console) -> None:
    from lowvram_grpo.recipe import preset

    table = Table(box=None, pad_edge=False)
    for column in ("preset", "card", "what it is"):
        table.add_column(column)
    for found in map(preset.load, preset.names()):
        table.add_row(found.name, f"{found.vram_gib:g} GB" if found.vram_gib else "CPU", found.summary)
    console.print(table)


def _show(console: Console, name: str) -> None:
    from lowvram_grpo.memory.ladder import AT_LOAD
    from lowvram_grpo.recipe import preset

    chosen = preset.load(name)
    console.print(f"[bold]{chosen.name}[/bold]  {chosen.summary}", soft_wrap=True)
    settings = Table("it begins with", "", box=None, show_edge=False)
    for key, value in chosen.settings.items():
        settings.add_row(key, str(value).lower() if isinstance(value, bool) else str(value))
    console.print(settings)
    if not chosen.ladder:
        return
    console.print("\nWhere memory is short, one rung after the other (* only before the weights are loaded):")
    ladder = Table(box=None, show_header=False, show_edge=False)
    ladder.add_column(justify="right")
    for number, (key, value) in enumerate(chosen.ladder, 1):
        ladder.add_row(f"{number}.", f"{key}={value}{' *' if key in AT_LOAD else ''}")
    console.print(ladder)
