"""Math-verify (on sympy) in a process of its own, which can be ended when it does not come back.

A time limit inside the process needs an alarm signal, which exists in POSIX main threads only, and no signal interrupts
one long multiplication. So formulas are compared in a child that runs symbolic_worker.py, started with the first one
that is more than a number. It also keeps sympy out of the training process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from lowvram_grpo.errors import UserError

SECONDS = 3.0
# A worker on a busy machine reads sympy's files for a while.
_START_SECONDS = 120.0
_REMEMBERED = 8192
_MAX_CHARACTERS = 600
_OUT_OF_TIME = "out of time"
# The worker would be ended, too, but only after its seconds, and for every completion that has one of these.
_EXPLOSIVE = re.compile(
    r"\^[\s{(]*\d+[\s})]*\^"  # 9^9^9
    r"|\^[\s{(]*-?\d{5,}"  # 2^99999
    r"|\d{4,}[\s})]*!|!\s*!"  # 99999!
    r"|\\binom[\s{(]*\d{4,}"
    r"|\\(?:sum|prod|int|lim)(?![A-Za-z]).*\d{4,}"
)


class Verdict(NamedTuple):
    """Of a reply beside its reference: whether they are equal (None where the reference can't be read), and what was
    read in either."""

    equal: bool | None
    gold: str
    reply: str


def explosive(formula: str) -> bool:
    """Whether sympy would work on `formula` for hours or until memory is gone."""
    return len(formula) > _MAX_CHARACTERS or bool(_EXPLOSIVE.search(formula))


def equal(gold: str, reply: str) -> bool | None:
    """Whether two formulas in LaTeX are equal as mathematics; None where math-verify can't read all of `gold`.

    False where no answer came within `SECONDS`, or sooner where `gold` ran out of them before. Safe in any thread.

    Raises:
        UserError: no helper process could be started.
    """
    if explosive(gold) or explosive(reply):
        return False
    return _worker.ask("formulas", gold, reply)


def verified(gold: str, reply: str) -> Verdict:
    """What math-verify finds in two texts, and whether that is equal; not equal where no answer came within `SECONDS`.
    Safe in any thread.

    Raises:
        UserError: no helper process could be started.
    """
    found = _worker.ask("texts", gold, reply)
    return Verdict(False, "[out of time]", "[out of time]") if found is False else Verdict(*found)


class _Worker:
    """One child process, asked one pair at a time."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, str], Any] = OrderedDict()
        self._slow: Counter[str] = Counter()
        self.forget()

    def forget(self) -> None:
        """Begin anew: a fork must share neither its parent's pipes nor a lock that nobody there will open."""
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def ask(self, kind: str, gold: str, reply: str) -> Any:
        """What the child says to two "formulas" or "texts", False where it ran out of time."""
        with self._lock:
            asked = (kind, gold, reply)
            if asked in self._known:
                self._known.move_to_end(asked)
                return self._known[asked]
            verdict = self._compute(kind, gold, reply)
            self._known[asked] = verdict
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            return verdict

    def _compute(self, kind: str, gold: str, reply: str) -> Any:
        if self._process is None or self._process.poll() is not None:
            self._start()
        # A reference that takes too long does so with every completion of its group, in every epoch.
        seconds = SECONDS / 2 ** min(self._slow[gold], 4)
        try:
            self._process.stdin.write(json.dumps([kind, gold, reply, seconds]) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=seconds + 1)
        except (OSError, queue.Empty):
            line = None
        if line is None:
            self.stop()
        verdict = _OUT_OF_TIME if line is None else json.loads(line)
        self._slow[gold] += verdict == _OUT_OF_TIME
        return False if verdict == _OUT_OF_TIME else verdict

    def _start(self) -> None:
        self._clear()
        # This package and no other: `-m` would look into the working folder first.
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path[:1] = [{root!r}]; from lowvram_grpo.rewards.symbolic_worker import serve; serve()"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise UserError(f"the reward 'accuracy' could not start its helper process ({error}).") from error
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        try:
            said = self._lines.get(timeout=_START_SECONDS)
        except queue.Empty:
            said = f"it said nothing for {_START_SECONDS:g} s"
        if said != "ready\n":
            self.stop()
            reason = (said or f"{sys.executable} ended at once").strip()
            raise UserError(
                f"the reward 'accuracy' could not start its helper process ({reason}); does `import math_verify` work?"
            )

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def _read(stream, lines: queue.Queue) -> None:
    # A thread, since Windows can't wait for a pipe with a time limit.
    with contextlib.suppress(OSError, ValueError):
        for line in stream:
            lines.put(line)
    lines.put(None)


_worker = _Worker()
atexit.register(_worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)
