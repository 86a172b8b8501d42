"""What the trainer tells a person while it works. The console is one observer; a script gets this one."""

from __future__ import annotations

import logging

# A script that handles its logs finds warnings there, too; without a handler they would be printed twice.
_LOGGER = logging.getLogger("lowvram_grpo")
_LOGGER.addHandler(logging.NullHandler())


class Observer:
    """Prints notices as lines, with `log_completions` also sample completions, and keeps quiet about the rest."""

    def __init__(self, *, log_completions: bool = False):
        self.log_completions = log_completions
        self.doing = ""

    def notice(self, text: str) -> None:
        """Something a person should know: shown once, kept on screen."""
        print(f"[lowvram-grpo] {text}", flush=True)

    def warning(self, text: str) -> None:
        """A notice that TRL would log as a warning."""
        _LOGGER.warning(text)
        self.notice(text)

    def phase(self, text: str) -> None:
        """What is going on right now; `doing` has it."""
        self.doing = text

    def sample(self, prompt: str, completion: str, reward: float, step: int) -> None:
        """The best completion of the rollout that `step` learns from."""
        if self.log_completions:
            print(f"[lowvram-grpo] step {step}, reward {reward:.3g}: {completion!r}", flush=True)
