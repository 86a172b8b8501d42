r"""Everything that a machine with a GPU is asked, in three commands that each fit a short lease.

    python benchmarks/gpu_suite.py --tier smoke|measure|rest [--out DIR] [--minutes M] [--only NAMES] [--dry-run]

    smoke    150 s   imports, every test of tests/gpu, a step of each preset, graph replay, a step-down, the demo
    measure  300 s   memory under an 8 GiB cap, the sweep, rollouts, a whole step, each beside its rivals
    rest     300 s   what settles constants: fused_ops, widths, knobs, attention, profiles; other sizes and caps, dtypes
                     and kernels; a learning run

Without --tier all three. Jobs are in tiers.py, in order of worth, each in a process of its own (suite.py); --only takes
their names or parts (tests, smoke, train, memory, kernels, rollouts, rivals, profile). What comes of it:

    rows.jsonl    a row as soon as it is there; the same command with the same --out goes on where it was stopped
    suite.log     what the jobs said
    smoke.txt     after smoke: every crash, each distinct traceback once (crashes.py)
    profile.txt   after rest: the longest kernels and gaps of a decode step and of a micro-batch

On a machine that is lent bare (no network; results only from $OUT; 64 MiB travel, 8 files of 16 MiB come back), here,
in the repository root, with the commit made:

    ../shared/gpu/stage-site.sh .gpu-stage
    cp ../shared/gpu/rivals.py ../shared/gpu/carry-model.py .gpu-stage/; git rev-parse HEAD >.gpu-stage/commit
    python3 benchmarks/gpu_suite.py --check

and optionally, for the learning run, a small model with real weights (docs/benchmarks.md). Then `run` there, each with
`carry` [".gpu-stage"], one after the other while the machine is warm:

    timeout_s 150:
    [ -d ~/site ] || { mkdir ~/site && tar xJf .gpu-stage/site.tar.xz -C ~/site; }; \
    export PYTHONPATH=~/site:$PWD; python3 benchmarks/gpu_suite.py --tier smoke --out $OUT

    timeout_s 300:
    [ -d ~/site ] || { mkdir ~/site && tar xJf .gpu-stage/site.tar.xz -C ~/site; }; \
    export PYTHONPATH=~/site:$PWD; cp .gpu-stage/results/* $OUT/ 2>/dev/null; \
    python3 benchmarks/gpu_suite.py --tier measure --out $OUT

    timeout_s 300:
    [ -d ~/site ] || { mkdir ~/site && tar xJf .gpu-stage/site.tar.xz -C ~/site; }; \
    export PYTHONPATH=~/site:$PWD; cp .gpu-stage/results/* $OUT/ 2>/dev/null; \
    python3 benchmarks/gpu_suite.py --tier rest --out $OUT

Read smoke.txt before the second: what it names is mended first. Copy what came back to .gpu-stage/results/ (to go on
with it) and to benchmarks/results/NAME/, then `python benchmarks/report.py` and `python benchmarks/calibrate.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import crashes
import limits
import report
import torch
from suite import HERE, Suite
from tiers import MINUTES, PARTS, TIERS, jobs

from lowvram_grpo.bench.rows import ROOT
from lowvram_grpo.run import jsonl


def environment() -> dict[str, Any]:
    """What a row of the card says beyond its name. Nothing here makes a CUDA context."""
    found: dict[str, Any] = {"cpu_count": os.cpu_count(), "nvidia_smi": None}
    if shutil.which("nvidia-smi"):
        for key, extra in (("nvidia_smi", []), ("nvidia_smi_q", ["-q", "-d", "CLOCK,POWER,TEMPERATURE,ECC"])):
            done = subprocess.run(["nvidia-smi", *extra], capture_output=True, text=True, timeout=20)
            found[key] = done.stdout[-6000:]
    return found


def check() -> None:
    """Print what a call would send."""
    size = limits.travelling(ROOT)
    print(f"{size / limits.MIB:.1f} MiB would travel; {limits.CARRIED // limits.MIB} may.")
    missing = [name for name in ("site.tar.xz", "rivals.py", "commit") if not (ROOT / ".gpu-stage" / name).is_file()]
    if missing:
        print(f"not staged: {', '.join(missing)}")
    sys.exit(size > limits.CARRIED or bool(missing))


def finish(out: Path, done: list[dict[str, Any]]) -> bool:
    """Say what came of it; whether all is well."""
    rows = jsonl.read(out / "rows.jsonl")
    failed = []
    if any(row.get("part") in ("smoke", "tests") for row in rows):
        (out / "smoke.txt").write_text(crashes.page(rows), encoding="utf-8")
        failed = [one for members in crashes.faults(crashes.latest(rows)).values() for one in members]
        print("\n".join(["", *(f"{row['status']}: {row['path']}" for row in failed)]))
    print("\n== summary")
    for row in done:
        print(f"{row['op']:22} {row['seconds']:6.1f} s  {row['status']:14} {row['new_rows']} rows"
              + (f", {row['rows_with_errors']} with errors" if row["rows_with_errors"] else ""))  # fmt: skip
    for line in report.headlines(report.load(out)):
        print(line)
    wrong = limits.coming_back(out)
    print("\n".join(f"WILL NOT COME BACK: {one}" for one in wrong) or "all files are within what comes back.")
    broken = [row["op"] for row in done if row["status"].startswith("exit code")]
    return not (failed or wrong or broken)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=list(TIERS), help="all of them, if left out")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", HERE / "results")))
    parser.add_argument("--minutes", type=float, help=f"for all jobs; by default {MINUTES}")
    parser.add_argument("--only", help="names of jobs or parts, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; what there is without a GPU")
    parser.add_argument("--check", action="store_true", help="whether what would travel is small enough, and stop")
    args = parser.parse_args(arguments)
    args.tiers = [args.tier] if args.tier else list(TIERS)
    args.minutes = args.minutes or sum(MINUTES[tier] for tier in args.tiers)
    args.dry_run = args.dry_run or not torch.cuda.is_available()
    args.only = set(args.only.split(",")) if args.only else None
    known = {job.name for job in jobs(args.tiers, True)} | set(PARTS)
    if args.only and (unknown := args.only - known):
        parser.error(f"unknown {', '.join(sorted(unknown))}; --only takes {', '.join(sorted(known))}")
    return args


def main() -> None:
    args = parsed()
    if args.check:
        check()
    # A tool that stops us says SIGTERM first: what was running is stopped, and what there is is summed up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if args.dry_run:
        print("dry run: tiny shapes, no measurement.")
    suite = Suite(args.out, args.minutes, args.dry_run, "+".join(args.tiers))
    suite.rows.add(op="env", again=True, **environment())
    done: list[dict[str, Any]] = []
    stopped = False
    try:
        suite.run(jobs(args.tiers, suite.wide, args.only), done)
    except KeyboardInterrupt:
        stopped = True
    finally:
        well = finish(args.out, done)
    if stopped:
        print("stopped; the same command goes on.")
        sys.exit(128 + signal.SIGINT)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
