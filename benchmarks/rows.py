"""Rows of results: JSON lines that say on what, with what and from which commit they were measured.

A row of a dry run (no GPU: tiny shapes, the interpreter) carries "dry_run": true, and `report.py` never shows it.
"""

from __future__ import annotations

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

from lowvram_grpo.run import jsonl

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("triton", "transformers", "bitsandbytes", "peft", "trl", "liger-kernel", "unsloth-zoo", "cut-cross-entropy")
# What makes two rows the same measurement; `gpu`, `commit` and `dry_run` are part of it.
KEY = (
    "part", "op", "provider", "path", "shape", "rows", "tokens", "dtype", "profile", "model", "weights", "gpu",
    "commit", "dry_run",
)  # fmt: skip


def commit() -> str | None:
    """LOWVRAM_COMMIT, what git says (with -dirty), or .gpu-stage/commit, which travels where .git does not."""
    if found := os.environ.get("LOWVRAM_COMMIT"):
        return found
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
    return note.read_text().strip() or None if note.is_file() else None


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
        "process": f"{os.getpid()}-{int(time.time())}",
        "dry_run": dry_run,
    }


class Rows:
    """Appends rows to a file as they come; rows that the file holds already need not be measured again."""

    def __init__(self, path: Path, dry_run: bool, **fixed: Any):
        self.path = path
        self.shared = {**provenance(dry_run), **fixed}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known = {self.key(row) for row in jsonl.read(path) if not row.get("again")}

    def key(self, row: dict[str, Any]) -> tuple:
        return tuple(str(row.get(name)) for name in KEY)

    def has(self, **row: Any) -> bool:
        return self.key({**self.shared, **row}) in self.known

    def add(self, **row: Any) -> dict[str, Any]:
        """Write one row. `again=True` marks one that the next process should try anew."""
        row = {**self.shared, "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **row}
        jsonl.append(self.path, [row])
        self.known.add(self.key(row))
        return row


def reason(error: BaseException) -> str:
    """One line of at most 200 characters."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
