"""Tokens a second of the rollout engine: a 0.5B model with random weights, G completions of each prompt at once.

    python benchmarks/part_rollouts.py --out rollouts.jsonl [--model Qwen2.5-0.5B] [--minutes 2]

Wall time of RolloutEngine.generate, prefill and sampling included, after a short warm-up; every completion has the
full length. Peak memory is above the weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from lowvram_grpo.bench.models import EOS, PAD, random_model
from lowvram_grpo.bench.rows import ROOT, Rows, reason
from lowvram_grpo.memory.architectures import resolve_config
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling

GROUP = 8
DRY_MODEL = str(ROOT / "lowvram_grpo" / "demo" / "model")


def sampling(length: int) -> Sampling:
    return Sampling(length, (EOS,), PAD, temperature=1.0, extra={"min_new_tokens": length})


def measure(model: torch.nn.Module, prompts: list[list[int]], group: int, length: int) -> dict:
    cuda = torch.cuda.is_available()
    sync = torch.cuda.synchronize if cuda else lambda: None
    RolloutEngine(model, sampling(min(8, length))).generate(prompts, group, seed=0)
    engine = RolloutEngine(model, sampling(length))
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    sync()
    started = time.perf_counter()
    batch = engine.generate(prompts, group, seed=1)
    sync()
    seconds = time.perf_counter() - started
    tokens = sum(map(len, batch.completion_ids))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "sampled": tokens, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="Qwen2.5-0.5B", help="as `lowvram-grpo plan` takes it")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4, 16], help="prompts at once")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda or args.dry_run:
        args.dry_run, args.model, args.prompt, args.length, args.prompts = True, DRY_MODEL, 8, 6, [1]
    until = time.monotonic() + 60 * args.minutes
    out = Rows(args.out, args.dry_run, part="rollouts")
    device = torch.device("cuda" if cuda else "cpu")
    half = torch.bfloat16 if cuda and torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    dtype = half if cuda else torch.float32
    config, _ = resolve_config(args.model)
    for weights in ("none", "nf4"):
        key = {"op": "generate", "provider": "ours", "model": args.model, "weights": weights, "dtype": str(dtype)[6:]}
        waiting = [n for n in args.prompts if not out.has(**key, rows=n * GROUP)]
        if not waiting:
            continue
        model = random_model(config, quantization=weights, dtype=dtype, device=device)
        for n in waiting:
            if time.monotonic() > until:
                print("time is up; the same command goes on where this one stopped.")
                return
            g = torch.Generator().manual_seed(n)
            prompts = torch.randint(3, config.get_text_config().vocab_size, (n, args.prompt), generator=g).tolist()
            try:
                row = measure(model, prompts, GROUP, args.length)
                said = f"{row['tokens_per_second']:8.0f} tokens/s"
            except Exception as error:  # out of memory at one batch says nothing about the next model
                row = {"error": reason(error)}
                said = row["error"]
            out.add(**key, rows=n * GROUP, group=GROUP, prompt=args.prompt, length=args.length, **row)
            print(f"{args.model} {weights:6} {n * GROUP:4} completions at once  {said}", flush=True)
        del model


if __name__ == "__main__":
    main()
