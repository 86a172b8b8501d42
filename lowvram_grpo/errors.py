"""What a person gets instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake or a missing thing outside this program: one clear sentence that names the cause and the fix. A
    ValueError, since that is what a script that came from TRL catches.

    The command line prints it without a traceback and exits with code 2.
    """


class Stopped(Exception):
    """A signal ended a run at the end of its step, with a checkpoint. The command line exits with `code`, as a shell
    names a process that the signal killed."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.code = 128 + signum


def counted(number: int, noun: str) -> str:
    """`1 reference`, `2 references`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def some(names: Iterable[str]) -> str:
    """Three names at most, quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_line(error: Exception) -> str:
    """The whole message of another library's error as one line of at most 300 characters, without its full stop."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
