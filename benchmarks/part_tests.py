"""tests/gpu, every test once, as rows.

    python benchmarks/part_tests.py --out rows.jsonl [--shard 0 --of 1] [--minutes 2] [TESTS ...]

A failed test fails nothing here: its traceback is in its row. tests/kernels hold the arithmetic in the interpreter, on
any machine; this is about the device.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest
import torch
from attempts import Attempts
from pytest_rows import RowsPlugin

from lowvram_grpo.bench.rows import LOST, ROOT, Rows

# Where a test hangs, the log gets what each thread was at.
HANGS_AFTER_S = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("tests", nargs="*", default=["tests/gpu"])
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    attempts = Attempts(Rows(args.out, args.dry_run or not torch.cuda.is_available(), part="tests"))
    plugin = RowsPlugin(attempts, args.shard, args.of, lambda: time.monotonic() > until)
    # Not the project's own options: every case, and one process, so that its end has the test that was running.
    options = ["-o", "addopts=", "-q", "--tb=long", "-p", "no:cacheprovider"]
    options += ["-o", f"faulthandler_timeout={HANGS_AFTER_S}"]
    code = pytest.main([*options, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *args.tests], [plugin])
    if code == LOST:
        sys.exit(LOST)
    told = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    sys.exit(0 if code in (*told, pytest.ExitCode.INTERRUPTED) else int(code))


if __name__ == "__main__":
    main()
