"""Whole training steps under the caps of 4, 6, 8 and 12 GB cards: predicted peak, measured peak, and TRL beside it.

    python benchmarks/part_memory.py --out memory.jsonl [--models Qwen2.5-0.5B ...] [--presets 8gb ...]
        [--providers ours trl] [--attention sdpa xformers] [--fused-ops off auto on] [--beside] [--steps 2]
        [--minutes 10]

Ours is `lowvram-grpo bench memory`: GRPOTrainer itself, sampling included, with the settings that the plan comes to,
G = 8, prompts of 256 tokens and completions of 300 (every one of them: the end token is withheld), random weights. Each
model runs under the smallest card that the plan says it fits, and under 8 GB (14B: 12 GB). A cap is what a Windows
desktop leaves of such a card, CUDA context included. TRL gets the same cap (rival_trl.py). Each run has a process of
its own. Runs that share the card with others (--beside) say nothing of time, nor of the context.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from memory_tables import BESIDE

from lowvram_grpo.bench.measure import apart
from lowvram_grpo.bench.memory import Case, cases, planned, run
from lowvram_grpo.bench.rows import ROOT, Rows, provenance_apart
from lowvram_grpo.cli.bench import sentence
from lowvram_grpo.recipe.config import GRPOConfig

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen3-8B", "Qwen3-14B")
RIVAL_MODELS = MODELS[:4]
PRESETS = ("4gb", "6gb", "8gb", "12gb")
FLAGS = {"num_generations": 8, "max_prompt_length": 256, "max_completion_length": 300}
# The bundled model, on a CPU.
DRY_MODEL = str(ROOT / "lowvram_grpo" / "demo" / "model")
DRY_FLAGS = {
    "num_generations": 4, "prompts_per_step": 1, "max_prompt_length": 8, "max_completion_length": 6,
    "quantization": "none", "head_dtype": "dense", "optim": "adamw_torch",
}  # fmt: skip
RIVAL = Path(__file__).with_name("rival_trl.py")


def main_preset(model: str) -> str:
    return "12gb" if model.endswith("14B") else "8gb"


def smallest(model: str) -> Case | None:
    """The case of the smallest card that the model is predicted to fit."""
    return next((case for case in cases([model], PRESETS, FLAGS) if planned(case).fits), None)


def in_order(dry_run: bool, models: Sequence[str] = MODELS) -> Iterator[tuple[str, Case]]:
    """(provider, case), what says most first."""
    if dry_run:
        (case,) = cases([DRY_MODEL], ["8gb"], DRY_FLAGS)
        yield from (("ours", case), ("trl", case))
        return
    seen = set()
    for model in models:
        (case,) = cases([model], [main_preset(model)], FLAGS)
        seen.add((model, case.recipe.preset))
        yield "ours", case
        if model in RIVAL_MODELS:
            yield "trl", case
    for model in models:
        case = smallest(model)
        if case is not None and (model, case.recipe.preset) not in seen:
            yield "ours", case


def chosen(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """What was asked for."""
    models = [DRY_MODEL] if args.dry_run else args.models or MODELS
    flags = DRY_FLAGS if args.dry_run else FLAGS
    if args.attention:
        if "attention" not in GRPOConfig.__dataclass_fields__:
            print("this version has no setting `attention`: there is nothing to compare.")
            return
        if "xformers" in args.attention and importlib.util.find_spec("xformers") is None:
            print("xformers is not installed: there is nothing to compare.")
            return
        for model in models:
            for name in args.attention:
                (case,) = cases([model], [main_preset(model)], {**flags, "attention": name})
                yield "ours", case
    elif args.fused_ops:
        for model in models:
            for name in args.fused_ops:
                (case,) = cases([model], [main_preset(model)], {**flags, "fused_ops": name})
                yield "ours", case
    elif args.presets and not args.dry_run:
        for case in cases(models, args.presets, flags):
            yield from ((name, case) for name in args.providers)
    else:
        yield from (one for one in in_order(args.dry_run, models) if one[0] in args.providers)


def rival(case: Case, rows: Rows, *, device: str, steps: int, until: float) -> None:
    """TRL's row."""
    setup = f"device={device} steps={steps} {case.setup}"
    key = {"op": "train-step", "provider": "trl", "model": case.recipe.model, "preset": case.recipe.preset,
           "setup": setup}  # fmt: skip
    if rows.has(**key):
        return
    row = {"cap_gib": round(case.budget / 2**30, 3), "vram_gib": case.card, "fits": None}
    if importlib.util.find_spec("trl") is None:
        row |= {"missing": "trl is not installed", "again": True}
    else:
        row |= apart(case.recipe, case.budget, steps, device, until - time.monotonic(), [str(RIVAL)])
        if row.get("peak_reserved_mib") is not None:
            row["peak_reserved_gib"] = row["peak_reserved_mib"] / 1024
            row["total_mib"] = round(row["peak_reserved_mib"] + row["context_mib"], 1)
    rows.add(**key, **row)
    print(f"trl: {Path(case.recipe.model).name} under {case.recipe.preset}: fits {row['fits']}, "
          f"{row.get('missing') or row.get('error') or row.get('step_s')}", flush=True)  # fmt: skip


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", help="as `lowvram-grpo plan` takes them")
    parser.add_argument("--presets", nargs="+", choices=PRESETS)
    parser.add_argument("--providers", nargs="+", choices=("ours", "trl"), default=["ours", "trl"])
    parser.add_argument("--attention", nargs="+", choices=("auto", "sdpa", "xformers"))
    parser.add_argument("--fused-ops", nargs="+", choices=("off", "auto", "on"))
    parser.add_argument("--beside", action="store_true", help="other processes use the card at the same time")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one run may take")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    args.dry_run = args.dry_run or not torch.cuda.is_available()
    return args


def main() -> None:
    args = parsed()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = 1 if args.dry_run else args.steps
    # Part of the key, so that such a run is made again alone, for its time.
    beside = {"profile": BESIDE} if args.beside else {}
    if args.beside:
        os.environ["LOWVRAM_BESIDE"] = "1"
    out = Rows(args.out, args.dry_run, shared=provenance_apart(args.dry_run), part="memory", **beside)
    until = time.monotonic() + 60 * args.minutes
    for provider, case in chosen(args):
        if time.monotonic() > until:
            print("time is up; the same command goes on where this one stopped.")
            return
        if provider == "trl":
            rival(case, out, device=device, steps=steps, until=min(until, time.monotonic() + args.limit))
        else:
            run([case], out, device=device, steps=steps, limit=args.limit, until=until,
                tell=lambda row: print(sentence(row), flush=True))  # fmt: skip


if __name__ == "__main__":
    main()
