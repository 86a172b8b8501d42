"""What the trainer tells a person while it works. The console is one observer; a script gets this one."""

from __future__ import annotations


class Observer:
    """Prints notices as lines and keeps quiet about the rest."""

    def notice(self, text: str) -> None:
        """Something a person should know: shown once, kept on screen."""
        print(f"[lowvram-grpo] {text}", flush=True)

    def phase(self, text: str) -> None:
        """What is going on right now."""

    def sample(self, prompt: str, completion: str, reward: float, step: int) -> None:
        """One completion of the current rollout."""
