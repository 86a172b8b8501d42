"""Math-verify (on sympy) in a process of its own, which can be ended when it does not come back.

A time limit inside the process needs an alarm signal, which exists in POSIX main threads only, and no signal interrupts
one long multiplication. So formulas are compared in a child, `python -m lowvram_grpo.rewards.symbolic_worker`, one for
the process, started with the first formula that is more than a number. It also keeps sympy out of the training process.
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
from collections import OrderedDict
from pathlib import Path

from lowvram_grpo.errors import UserError

SECONDS = 3.0
# A worker on a busy machine reads sympy's files for a while.
_START_SECONDS = 120.0
_REMEMBERED = 8192
_MAX_CHARACTERS = 600
# The worker would be ended, too, but only after its seconds, and for every completion that has one of these.
_EXPLOSIVE = re.compile(
    r"\^[\s{(]*\d+[\s})]*\^"  # 9^9^9
    r"|\^[\s{(]*-?\d{5,}"  # 2^99999
    r"|\d{4,}[\s})]*!|!\s*!"  # 99999!
    r"|\\binom[\s{(]*\d{4,}"
    r"|\\(?:sum|prod|int|lim)(?![A-Za-z]).*\d{4,}"
)


def explosive(formula: str) -> bool:
    """Whether sympy would work on `formula` for hours or until memory is gone."""
    return len(formula) > _MAX_CHARACTERS or bool(_EXPLOSIVE.search(formula))


def equal(gold: str, reply: str) -> bool | None:
    """Whether two formulas in LaTeX are equal as mathematics; None where `gold` is none that math-verify can read.

    False where no answer came within `SECONDS`. Safe to call from any thread.

    Raises:
        UserError: no worker could be started.
    """
    if explosive(gold) or explosive(reply):
        return False
    return _worker.ask(gold, reply)


class _Worker:
    """One child process, asked one pair at a time."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], bool | None] = OrderedDict()
        self.forget()

    def forget(self) -> None:
        """Begin anew: a fork must share neither its parent's pipes nor a lock that nobody there will open."""
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def ask(self, gold: str, reply: str) -> bool | None:
        with self._lock:
            if (gold, reply) in self._known:
                self._known.move_to_end((gold, reply))
                return self._known[gold, reply]
            verdict = self._compute(gold, reply)
            self._known[gold, reply] = verdict
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            return verdict

    def _compute(self, gold: str, reply: str) -> bool | None:
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            self._process.stdin.write(json.dumps([gold, reply, SECONDS]) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=SECONDS + 1)
        except (OSError, queue.Empty):
            line = None
        if line is None:
            self.stop()
            return False
        return json.loads(line)

    def _start(self) -> None:
        self._clear()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lowvram_grpo.rewards.symbolic_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise UserError(f"the reward 'accuracy' could not start its helper process ({error}).") from error
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        try:
            ready = self._lines.get(timeout=_START_SECONDS)
        except queue.Empty:
            ready = None
        if ready is None:
            self.stop()
            raise UserError(
                "the helper process of the reward 'accuracy' did not start: see what "
                f"`{sys.executable} -m lowvram_grpo.rewards.symbolic_worker` says."
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
