"""What the trainer tells a person while it works. The console is one observer; a script gets this one."""

from __future__ import annotations


class Observer:
    """Prints notices as lines, with `log_completions` also sample completions, and keeps quiet about the rest."""

    def __init__(self, *, log_completions: bool = False):
        self.log_completions = log_completions
        self.doing = ""

    def notice(self, text: str) -> None:
        """Something a person should know: shown once, kept on screen."""
        print(f"[lowvram-grpo] {text}", flush=True)

    def phase(self, text: str) -> None:
        """What is going on right now; `doing` has it."""
        self.doing = text

    def sample(self, prompt: str, completion: str, reward: float, step: int) -> None:
        """The best completion of the rollout that `step` learns from."""
        if self.log_completions:
            print(f"[lowvram-grpo] step {step}, reward {reward:.3g}: {completion!r}", flush=True)
