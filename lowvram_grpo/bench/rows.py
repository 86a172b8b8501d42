"""Rows of results: JSON lines that say on what, with what and from which commit they were measured.

A row of a dry run (no GPU: tiny shapes, the interpreter) carries "dry_run": true, and `report.py` never shows it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lowvram_grpo import __version__
from lowvram_grpo.run import jsonl

ROOT = Path(__file__).resolve().parents[2]
# An installed package has no commit of its own, whatever repository its environment lies in.
_CHECKOUT = (ROOT / "pyproject.toml").is_file() and (ROOT / "kernels").is_dir()
PACKAGES = ("triton", "transformers", "bitsandbytes", "peft", "trl", "liger-kernel", "unsloth-zoo", "cut-cross-entropy")
# The exit code of a process whose CUDA context is lost: whatever it tried next would fail with the same error.
LOST = 75
# What makes two rows the same measurement; `gpu`, `commit` and `dry_run` are part of it.
KEY = (
    "part", "op", "provider", "path", "shape", "rows", "tokens", "dtype", "profile", "model", "weights", "gpu",
    "commit", "dry_run", "preset", "setup",
)  # fmt: skip


def commit() -> str | None:
    """LOWVRAM_COMMIT, what git says (with -dirty), or .gpu-stage/commit, which travels where .git does not; the version
    of an installed package."""
    if found := os.environ.get("LOWVRAM_COMMIT"):
        return found
    if not _CHECKOUT:
        return f"release {__version__}"
    git = lambda *a: subprocess.run(["git", "-C", ROOT, *a], capture_output=True, text=True, timeout=20)
    try:
        head = git("rev-parse", "HEAD")
        if head.returncode == 0:
            # What has been measured before is no change of what is measured.
            changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
            return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        pass
    note = ROOT / ".gpu-stage" / "commit"
    return note.read_text(encoding="utf-8").strip() or None if note.is_file() else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def provenance(dry_run: bool) -> dict[str, Any]:
    """The part that all rows of one process share.

    Raises:
        SystemExit: a measurement of which nobody could say what was measured.
    """
    found = commit()
    if found is None and not dry_run:
        sys.exit("error: no commit: set LOWVRAM_COMMIT, or write it to .gpu-stage/commit before the tree travels.")
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "cpu",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "cuda": torch.version.cuda,
        "versions": versions(),
        "commit": found,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "process": _process(),
        "dry_run": dry_run,
    }


def provenance_apart(dry_run: bool) -> dict[str, Any]:
    """`provenance` with the card asked by another process: asking makes a CUDA context, which on a small card is what
    the process that measures would miss. LOWVRAM_PROVENANCE holds what has been asked already."""
    if not torch.cuda.is_available():
        return provenance(dry_run)
    if known := os.environ.get("LOWVRAM_PROVENANCE"):
        own = {"command": shlex.join([Path(sys.executable).name, *sys.argv]), "process": _process()}
        return json.loads(known) | own | {"dry_run": dry_run}
    code = f"import json; from lowvram_grpo.bench.rows import provenance; print(json.dumps(provenance({dry_run})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", timeout=300)
    if done.returncode:
        sys.exit(done.stderr.strip()[-400:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"command": shlex.join([Path(sys.executable).name, *sys.argv]), "process": _process()}


def _process() -> str:
    return f"{os.getpid()}-{int(time.time())}"


class Rows:
    """Appends rows to a file as they come; rows that the file holds already need not be measured again. A job of the
    suite whose CUDA context is lost ends with its next row, with exit code LOST.

    `shared` is what all rows carry, where it has been found already; `fixed` comes on top.
    """

    def __init__(self, path: Path, dry_run: bool, *, shared: dict[str, Any] | None = None, **fixed: Any):
        self.path = path
        self.shared = {**(provenance(dry_run) if shared is None else shared), **fixed}
        if job := os.environ.get("LOWVRAM_JOB"):  # of benchmarks/gpu_suite.py, which counts its rows
            self.shared["job"] = job
        # Whether `add` ends this process once CUDA answers it no more: another one can go on.
        self.leaves = bool(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_row(path)
        self.known = {self.key(row): row for row in jsonl.read(path) if not row.get("again")}

    def key(self, row: dict[str, Any]) -> tuple:
        return tuple(str(row.get(name)) for name in KEY)

    def has(self, **row: Any) -> bool:
        return self.get(**row) is not None

    def get(self, **row: Any) -> dict[str, Any] | None:
        """The row that the file has under this key."""
        return self.known.get(self.key({**self.shared, **row}))

    def add(self, **row: Any) -> dict[str, Any]:
        """Write one row. `again=True` marks one that the next process should try anew."""
        row = {**self.shared, "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **row}
        jsonl.append(self.path, [row])
        self.known[self.key(row)] = row
        if self.leaves and row.get("error") and context_is_lost():
            print("the CUDA context is lost; a new process has to go on.", flush=True)
            sys.exit(LOST)
        return row


def context_is_lost() -> bool:
    """Whether CUDA has stopped answering this process (an illegal access, a device-side assertion)."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def _end_torn_row(path: Path) -> None:
    """Half a row that a killed process left at the end would take the next one with it."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def reason(error: BaseException) -> str:
    """One line of at most 200 characters."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
