"""The owner's rivals.py, where it has been staged: TRL's trainer under a cap, and everybody's loss.

    python benchmarks/part_rivals.py --out rows.jsonl --mode train|loss [--models 1.5b] [--minutes 2]

Its rows name no commit: they are those of the header row that is written before them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from lowvram_grpo.bench.rows import ROOT, provenance_apart
from lowvram_grpo.run import jsonl

RIVALS = ROOT / ".gpu-stage" / "rivals.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mode", choices=("train", "loss"), required=True)
    parser.add_argument("--models")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not RIVALS.is_file():
        print("not staged: there is no .gpu-stage/rivals.py")
        return
    dry_run = args.dry_run or not torch.cuda.is_available()
    if dry_run and args.mode == "train":
        print("a dry run leaves this to the script's owner.")
        return
    header = {**provenance_apart(dry_run), "part": "rivals", "op": "header", "mode": args.mode}
    known = jsonl.read(args.out)
    same = [row for row in known if row.get("op") == "ended" and row.get("mode") == args.mode]
    if any(all(row.get(key) == header[key] for key in ("gpu", "commit", "dry_run")) for row in same):
        return
    jsonl.append(args.out, [header])
    models = ["--models", args.models] if args.models and args.mode == "train" else []
    command = [sys.executable, RIVALS, args.mode, "--out", args.out, "--minutes", f"{args.minutes:.2f}", *models]
    code = subprocess.run([str(x) for x in command]).returncode
    if code == 0:
        jsonl.append(args.out, [{**header, "part": "suite", "op": "ended", "again": True}])
    sys.exit(code)


if __name__ == "__main__":
    main()
