"""Checks of which each is tried once, also where one of them ends the process that tries them.

A row says that a check has begun, another how it ended. A process that is started again because the one before it
crashed (the suite sets LOWVRAM_CRASHED to the last that it said) finds the check that had begun and not ended, writes
it down as the one that crashed, and goes on behind it. An interrupted suite sets nothing: what had begun is tried
again.
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

from lowvram_grpo.bench.rows import Rows
from lowvram_grpo.run import jsonl

# A row holds at most so much of a traceback: what of a long one says most stands at both ends.
TRACE = 24_000
_RAISED = re.compile(r"(E\s+)?[\w.]*(Error|Exception|Exit|Failed)\b")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+|\d+")


class Attempts:
    """The checks of one part; each has a name, which stands in its row as `path`."""

    def __init__(self, rows: Rows):
        self.rows = rows
        rows.leaves = False
        self.crashed = os.environ.get("LOWVRAM_CRASHED")
        self._began: dict[str, float] = {}
        known = jsonl.read(rows.path)
        same = ("part", "gpu", "commit", "dry_run")
        mine = [row for row in known if all(row.get(key) == rows.shared.get(key) for key in same)]
        self.ended = {row["path"] for row in mine if row["op"] == "check"}
        self._open = {row["path"] for row in mine if row["op"] == "began"} - self.ended

    def waiting(self, name: str) -> bool:
        """Whether `name` is still to be tried; one that crashed the process before this one gets its row now."""
        if name in self._open and self.crashed:
            self._open.discard(name)
            self.end(name, "crashed", error="the process ended in the middle of it", trace=self.crashed)
        return name not in self.ended

    def begin(self, name: str) -> None:
        self._began[name] = time.perf_counter()
        self.rows.add(op="began", path=name, again=True)

    def end(self, name: str, status: str, **found: Any) -> None:
        """`status`: passed, failed, skipped or crashed. With `trace`, the row gets its signature."""
        began = self._began.pop(name, None)
        seconds = None if began is None else round(time.perf_counter() - began, 2)
        if trace := found.get("trace"):
            half = TRACE // 2
            found["trace"] = trace if len(trace) <= TRACE else f"{trace[:half]}\n[...]\n{trace[-half:]}"
            found["signature"] = signature(trace)
        self.ended.add(name)
        self.rows.add(op="check", path=name, status=status, seconds=seconds, **found)


def signature(trace: str) -> str:
    """What two tracebacks of the same fault have in common: where it was raised in this project, and what it said
    without its numbers."""
    lines = [line for line in trace.splitlines() if line.strip()]
    places = re.findall(r"((?:lowvram_grpo|kernels|benchmarks|tests)/[\w/]+\.py)\D{1,10}(\d+)", trace)
    raised = [line for line in lines if _RAISED.match(line)]
    said = raised[-1] if raised else next((line for line in lines if line.startswith("E ")), lines[-1] if lines else "")
    # A crash's stack, as faulthandler prints it, begins with the innermost frame.
    inner = places[0] if "most recent call first" in trace and places else places[-1] if places else ("?",)
    where = ":".join(inner)
    return f"{where} {_ADDRESS.sub('#', said.removeprefix('E').strip())}"[:300]
