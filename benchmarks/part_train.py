"""A short run through the command line on this device: the bundled model learns, or it does not.

    python benchmarks/part_train.py --out train.jsonl [--steps 60] [--learn]

`lowvram-grpo demo` stays on the CPU wherever it runs, so this is `lowvram-grpo train` with the demo's recipe. It says
that every part works together on this device; the model is far too small for its speed to mean anything. With --learn
a model with real weights trains instead, where one has been staged (docs/benchmarks.md): .gpu-stage/learn/ holds what
carry-model.py packed, data.jsonl and recipe.toml (learn.toml is one).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lowvram_grpo.bench.rows import ROOT, Rows, reason
from lowvram_grpo.run import jsonl

ASSETS = ROOT / "lowvram_grpo" / "demo"
STAGE = ROOT / ".gpu-stage"
LEARN = STAGE / "learn"


def command(folder: Path, steps: int, learn: bool = False) -> list[str]:
    """The call that trains into `folder`/run, model and all."""
    recipe, model, data = ASSETS / "recipe.toml", ASSETS / "model", ASSETS / "prompts.jsonl"
    if learn:
        recipe, model, data = LEARN / "recipe.toml", folder / "model", LEARN / "data.jsonl"
        subprocess.run([sys.executable, STAGE / "carry-model.py", "join", LEARN, model], check=True)
    call = [
        sys.executable, "-m", "lowvram_grpo.cli.app", "train", "-c", recipe, "-m", model, "-d", data,
        "-o", folder / "run", "--max-steps", steps, "--plain",
    ]  # fmt: skip
    if not learn and importlib.util.find_spec("math_verify") is None:
        call += ["-r", "label"]  # the recipe's `accuracy` needs it
    if not torch.cuda.is_available():
        call += ["--preset", "cpu", "--use-cpu"]
    return [str(x) for x in call]


def summary(rows: list[dict]) -> dict:
    rows = [row for row in rows if row.get("reward") is not None]
    rewards = [row["reward"] for row in rows]
    ten = max(1, min(10, len(rewards) // 3))
    mean = lambda xs: sum(xs) / len(xs)
    gaps = [row.get("sampling/sampling_logp_difference/max") for row in rows]
    return {
        "steps": len(rows),
        "reward_first": mean(rewards[:ten]),
        "reward_last": mean(rewards[-ten:]),
        "step_s": statistics.median(row["step_time"] for row in rows),
        "peak_gib": rows[-1].get("memory/peak_gib"),
        "sampling_gap_max": max((g for g in gaps if g is not None), default=None),
    }


def _rewards(rows: list[dict]) -> list[float]:
    """Of every step that has one, for the picture."""
    return [round(row["reward"], 4) for row in rows if row.get("reward") is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learn", action="store_true", help="the model that has been staged, where there is one")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available() or args.dry_run:
        args.dry_run, args.steps = True, 3
    out = Rows(args.out, args.dry_run, part="train")
    learn = args.learn and LEARN.is_dir()
    key = {"op": "demo", "provider": "ours", "model": "staged" if learn else "bundled"}
    key["setup"] = f"{args.steps} steps"
    if out.has(**key):
        return
    with tempfile.TemporaryDirectory() as folder:
        call = command(Path(folder), args.steps, learn)
        started = time.perf_counter()
        try:
            done = subprocess.run(
                call, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=60 * args.minutes
            )
            error = None if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-400:]}"
            trace = None if done.returncode == 0 else done.stdout[-4000:] + done.stderr[-8000:]
            print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
        except subprocess.TimeoutExpired as expired:
            error, trace = reason(expired), None
        row = {"seconds": time.perf_counter() - started, "called": call[2:], "again": error is not None}
        metrics = jsonl.read(Path(folder) / "run" / "metrics.jsonl")
        row |= summary(metrics) if any(r.get("reward") is not None for r in metrics) else {}
        out.add(**key, error=error, trace=trace, rewards=_rewards(metrics), **row)
    if error:
        sys.exit(error)
    print({k: row[k] for k in ("steps", "reward_first", "reward_last", "step_s", "peak_gib")})


if __name__ == "__main__":
    main()
