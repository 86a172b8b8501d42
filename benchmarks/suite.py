"""Runs jobs, each in a process of its own with its share of the time, so that a crash or a hang of one costs no other.

Jobs that follow one another and name the same `beside` run at the same time where the card and the host are large
enough: what they say is no time. Rows are on disk as they come; a second run with the same folder goes on.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowvram_grpo.bench.rows import LOST, ROOT, Rows, provenance_apart
from lowvram_grpo.run import jsonl

HERE = Path(__file__).resolve().parent
ROWS, LOG = "rows.jsonl", "suite.log"
# Of the 16 MiB that a file may have to come back.
LOG_BYTES = 8 * 2**20
# A job stops by itself so long before it is stopped.
GRACE_S = 8


class Job(NamedTuple):
    """A script of this folder that takes --out, --minutes and --dry-run.

    Attributes:
        args: further arguments; `dry` in a dry run, where they are other ones.
        share: of the time that is left, among the jobs that are; unused time goes to those that follow.
        least_s: below so many seconds it is not worth its start.
        beside: jobs with the same word run side by side.
        part: what --only calls it.
    """

    name: str
    script: str
    args: Sequence[str] = ()
    share: float = 1.0
    least_s: float = 10.0
    beside: str = ""
    part: str = ""
    dry: Sequence[str] | None = None


class _Running:
    """A job's process; its output goes to the log, to the screen, and its end is kept."""

    def __init__(self, job: Job, command: list[str], environment: dict[str, str], log: _Log):
        self.job, self.last = job, deque(maxlen=60)
        posix = os.name == "posix"
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace", preexec_fn=_own_group if posix else None,
        )  # fmt: skip
        log.write(f"\n== {job.name}: {' '.join(command)}\n")
        self._log = log
        self._reader = threading.Thread(target=self._copy, daemon=True)
        self._reader.start()

    def _copy(self) -> None:
        for line in self.process.stdout:
            self.last.append(line)
            self._log.write(f"[{self.job.name}] {line}")
            print(f"[{self.job.name}] {line}", end="", flush=True)

    def end(self) -> None:
        """Wait for what it has still to say."""
        self._reader.join(timeout=5)

    def stop(self) -> None:
        """With its children: a memory job's own may be training."""
        for kind in ("SIGTERM", "SIGKILL"):
            if self.process.poll() is not None and kind == "SIGTERM":
                break
            try:
                if os.name == "posix":
                    os.killpg(self.process.pid, getattr(signal, kind))
                else:
                    self.process.kill()
                self.process.wait(timeout=5)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
            break
        self.end()


def _own_group() -> None:
    """A group of its own, to be stopped as one; and on Linux an end with the suite's, even where that is killed."""
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Log:
    """Appends to a file until it is as long as it may be."""

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (close() closes it)
        self._left = LOG_BYTES - path.stat().st_size
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        with self._lock:
            if self._left > 0:
                self._file.write(text)
                self._left -= len(text.encode("utf-8", "replace"))

    def close(self) -> None:
        with self._lock:
            self._left = 0
            self._file.close()


class Suite:
    """
    Args:
        out: folder of rows and log.
        minutes: for all jobs together.
        tier: the name that its summary rows carry.
    """

    def __init__(self, out: Path, minutes: float, dry_run: bool, tier: str = ""):
        self.out, self.dry_run = out, dry_run
        self.until = time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        shared = provenance_apart(dry_run)
        self.rows = Rows(out / ROWS, dry_run, shared=shared, part="suite", tier=tier)
        self.log = _Log(out / LOG)
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
            "TRITON_INTERPRET": "1" if dry_run else "0",
            # On an H100 PyTorch tries cuDNN's attention first, which builds a plan for each new shape; on the cards
            # that this is about it does not. With it, times would say little about them.
            "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
            # Asked once: asking makes a process and a CUDA context.
            "LOWVRAM_PROVENANCE": json.dumps(shared),
        }
        self._running: list[_Running] = []

    @property
    def wide(self) -> bool:
        """Whether card and host have room for several jobs at a time."""
        return (self.rows.shared["memory_gib"] or 0) >= 40 and (os.cpu_count() or 1) >= 8

    def run(self, jobs: Sequence[Job], done: list[dict[str, Any]]) -> None:
        """`done` receives their summary rows. Whatever ends this, no process of a job outlives it."""
        waiting = list(jobs)
        try:
            while waiting:
                together = self._batch(waiting)
                left = max(0.0, self.until - time.monotonic())
                mine = sum(job.share for job in together)
                seconds = min(left, max(*(job.least_s for job in together), 0,
                                        left * mine / sum(job.share for job in waiting)))  # fmt: skip
                waiting = waiting[len(together) :]
                done += self._batch_of(together, seconds)
        finally:
            for running in self._running:
                running.stop()
            self.log.close()

    def _batch(self, waiting: list[Job]) -> list[Job]:
        """The jobs that are next, as many as may run at the same time."""
        first, found = waiting[0], waiting[:1]
        if first.beside and self.wide:
            for job in waiting[1:]:
                if job.beside != first.beside:
                    break
                found.append(job)
        return found

    def _batch_of(self, jobs: list[Job], seconds: float) -> list[dict[str, Any]]:
        started, until = time.monotonic(), time.monotonic() + seconds
        before = {job.name: self._rows_of(job) for job in jobs}
        if seconds < 5:
            return [self._said(job, "no time left", 0.0, 0) for job in jobs]
        live, ended = [], {}
        for job in jobs:
            live.append(self._start(job, until))
        while live and time.monotonic() < until:
            for running in [one for one in live if one.process.poll() is not None]:
                live.remove(running)
                running.end()
                job, code = running.job, running.process.returncode
                if self._worth_another(job, code, before) and until - time.monotonic() > job.least_s:
                    live.append(self._start(job, until, crashed=running))
                else:
                    ended[job.name] = "ok" if code == 0 else f"exit code {code}", time.monotonic() - started
            time.sleep(0.05)
        for running in live:
            running.stop()
            ended[running.job.name] = "out of time", time.monotonic() - started
        self._running = []
        return [self._said(job, *ended[job.name], before[job.name][0]) for job in jobs]

    def _start(self, job: Job, until: float, crashed: _Running | None = None) -> _Running:
        left = until - time.monotonic()
        args = job.dry if self.dry_run and job.dry is not None else job.args
        command = [sys.executable, HERE / job.script, "--out", self.rows.path, *args]
        command += ["--minutes", f"{max(2.0, left - GRACE_S) / 60:.2f}", *(["--dry-run"] if self.dry_run else [])]
        environment = self.environment | {"LOWVRAM_JOB": job.name}
        if crashed:
            code = crashed.process.returncode
            environment["LOWVRAM_CRASHED"] = f"exit code {code}\n" + "".join(crashed.last)[-6000:]
        running = _Running(job, [str(x) for x in command], environment, self.log)
        self._running.append(running)
        return running

    def _rows_of(self, job: Job) -> list[int]:
        """[rows at its start, rows at its last start]."""
        count = len(self._written(job))
        return [count, count]

    def _written(self, job: Job) -> list[dict[str, Any]]:
        return [row for row in jsonl.read(self.rows.path) if row.get("job") == job.name]

    def _worth_another(self, job: Job, code: int, before: dict[str, list[int]]) -> bool:
        """A process that lost its CUDA context or crashed is started again if it had come any further."""
        now, marks = len(self._written(job)), before[job.name]
        further, marks[1] = now > marks[1], now
        return (code == LOST or code < 0 or code > 128) and further

    def _said(self, job: Job, status: str, seconds: float, before: int) -> dict[str, Any]:
        written = self._written(job)[before:]
        failed = [r for r in written if r.get("error") and not r.get("out_of_memory")]
        return self.rows.add(
            op=job.name, status=status, seconds=round(seconds, 1), again=True, new_rows=len(written),
            rows_with_errors=len(failed),
        )  # fmt: skip
