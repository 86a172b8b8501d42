"""What a rollout takes with other values of the constants that set its pace, beside those that it has.

    python benchmarks/part_knobs.py --out rows.jsonl [--models Qwen2.5-0.5B Qwen2.5-7B] [--minutes 1]

    prefill_tokens   tokens of prompts that are prefilled together: 8 prompts of 256 tokens, 4 new tokens each
    look_every       steps between two looks at which rows have ended: 64 tokens of 16 completions, none of which ends
                     early, so that a row says what looking costs and nothing of what not looking does

Medians of the rounds; the values take turns. `calibrate.py` makes proposals of the rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from rollout_model import DRY_MODEL, load
from rollout_providers import Task, ours, sync

from lowvram_grpo.bench.rows import Rows, reason
from lowvram_grpo.policy.load import compute_dtype
from lowvram_grpo.rollout import decode, engine

MODELS = ["Qwen2.5-0.5B", "Qwen2.5-7B"]
KNOBS = {"prefill_tokens": (1024, 512, 2048, 4096), "look_every": (8, 4, 16, 32)}


@contextmanager
def turned(knob: str, value: int) -> Iterator[None]:
    """The constant has `value` for as long as the block runs."""
    if knob == "prefill_tokens":
        with patch.object(decode, "PREFILL_TOKENS", value):
            yield
    else:
        run = decode.run
        with patch.object(engine, "run", lambda decoder: run(decoder, look_every=value)):
            yield


def task_of(knob: str, dry_run: bool) -> Task:
    if dry_run:
        return Task([[3 + i + j for j in range(8)] for i in range(2)], 2, 4, greedy=False)
    if knob == "prefill_tokens":
        return Task([[3 + 7 * i + j for j in range(256)] for i in range(8)], 2, 4, greedy=False)
    return Task([[3 + 7 * i + j for j in range(256)] for i in range(2)], 8, 64, greedy=False)


def measure(model: torch.nn.Module, knob: str, values: list[int], args: argparse.Namespace) -> dict[int, dict]:
    """value -> seconds and peak MiB, or the error."""
    task, found = task_of(knob, args.dry_run), {}
    seconds: dict[int, list[float]] = {value: [] for value in values}
    peaks: dict[int, float] = {}
    for at in range(-1, args.rounds):  # the first round compiles and chooses
        for value in values if at % 2 else reversed(values):
            if value in found:
                continue
            try:
                if args.cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                sync(args.device)
                began = time.perf_counter()
                with turned(knob, value), torch.autocast("cuda", args.dtype) if args.cuda else nullcontext():
                    ours(model, task)
                sync(args.device)
                if at >= 0:
                    seconds[value].append(time.perf_counter() - began)
                    peaks[value] = torch.cuda.max_memory_allocated() / 2**20 if args.cuda else 0.0
            except Exception as error:  # one value must not cost the others their rows
                full = isinstance(error, torch.OutOfMemoryError)
                found[value] = {"error": reason(error), "out_of_memory": full}
    for value in values:
        if value not in found:
            found[value] = {"seconds": statistics.median(seconds[value]), "peak_mib": peaks[value],
                            "rounds": len(seconds[value])}  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    args.cuda = torch.cuda.is_available()
    args.device = torch.device("cuda" if args.cuda else "cpu")
    args.dtype = compute_dtype(args.device)
    args.dry_run = args.dry_run or not args.cuda
    args.rounds = 1 if args.dry_run else args.rounds
    out = Rows(args.out, args.dry_run, part="knobs")
    for name in [DRY_MODEL] if args.dry_run else args.models:
        model = None
        for knob, values in KNOBS.items():
            key = {"op": knob, "provider": "ours", "model": Path(name).name}
            waiting = [value for value in values if not out.has(**key, rows=value)]
            if not waiting or time.monotonic() > until:
                continue
            if model is None:
                model = load(name, "nf4" if args.cuda else "none", 16, args.dtype, args.device)
            # All of them again: only what took turns may be compared.
            for value, row in measure(model, knob, list(values), args).items():
                out.add(**key, rows=value, value=value, **row)
                print(f"{key['model']} {knob} {value}: {row.get('error') or row['seconds']}", flush=True)


if __name__ == "__main__":
    main()
