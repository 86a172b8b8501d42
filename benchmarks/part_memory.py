"""The whole training step under a hard cap: which model fits an 8 GB card, at what peak, in how many seconds.

    python benchmarks/part_memory.py --out memory.jsonl [--models qwen2.5-0.5b,...] [--cap-gib 8] [--steps 2]

GRPOTrainer itself, sampling included: NF4 base, LoRA on all linear layers, G = 8, prompts of 256 tokens, completions of
300 (every one of them: the end token is withheld). Each model runs in a process of its own; the cap is
torch.cuda.set_per_process_memory_fraction, which does not see the CUDA context: `context_gib` is what the driver
reports beyond the allocator, and a real card has to hold it too.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from models import LORA, SIZES, random_model, word_prompts, word_tokenizer
from rows import Rows, reason

MODELS = [name for name in SIZES if name != "dry"]
GROUP = 8


def drawn(completions: list[str], **_) -> list[float]:
    """A reward that differs within every group, so that no row of the update is without a gradient."""
    return [random.random() for _ in completions]


def train(name: str, args: argparse.Namespace) -> dict:
    """Metrics of the last of `args.steps` optimizer steps, and the peak."""
    from datasets import Dataset
    from peft import LoraConfig

    from lowvram_grpo import GRPOConfig, GRPOTrainer

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    total = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    if cuda:
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    dtype = torch.bfloat16 if cuda and torch.cuda.get_device_capability()[0] >= 8 else torch.float32
    dtype = torch.float16 if cuda and dtype == torch.float32 else dtype
    model = random_model(name, four_bit=True, dtype=dtype, device=device)
    row = {"load_gib": torch.cuda.memory_allocated() / 2**30 if cuda else None}
    tokenizer = word_tokenizer(SIZES[name].vocab)
    data = Dataset.from_dict({"prompt": word_prompts(16, args.prompt, SIZES[name].vocab)})
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=not cuda, max_steps=args.steps, num_generations=args.group, prompts_per_step=1,
            per_device_train_batch_size=args.micro_batch, max_completion_length=args.completion,
            generation_kwargs={"min_new_tokens": args.completion}, optim=args.optim, report_to="none",
            save_strategy="no", disable_tqdm=True, signal_check=False, learning_rate=1e-5,
        )  # fmt: skip
        trainer = GRPOTrainer(model, drawn, config, data, processing_class=tokenizer, peft_config=LoraConfig(**LORA))
        started = time.perf_counter()
        trainer.train()
        row["train_s"] = time.perf_counter() - started
    logged = [r for r in trainer.state.log_history if "step_time" in r]
    last = logged[-1]
    row |= {
        "fits": True,
        "step_s": [r["step_time"] for r in logged],
        "tokens_per_second": last.get("tokens_per_second"),
        "entropy": last.get("entropy"),
        "completion_length": last.get("completions/mean_length"),
        "sampling_gap_max": last.get("sampling/sampling_logp_difference/max"),
    }
    return row


def one(name: str, args: argparse.Namespace, out: Rows) -> None:
    settings = {
        "model": name, "cap_gib": args.cap_gib, "group": args.group, "prompt": args.prompt,
        "completion": args.completion, "micro_batch": args.micro_batch, "steps": args.steps, "optim": args.optim,
    }  # fmt: skip
    try:
        row = train(name, args)
    except torch.OutOfMemoryError as error:
        row = {"fits": False, "error": reason(error)}
    except Exception as error:
        # The trainer names the phase that ran out of memory in an error of its own.
        memory = isinstance(error.__cause__, torch.OutOfMemoryError)
        row = {"fits": False if memory else None, "error": reason(error)}
        if not memory:
            import traceback

            traceback.print_exc()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        row |= {
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            # Others on the card would count here: it is an upper bound.
            "context_gib": (total - free - reserved) / 2**30,
        }
    row = out.add(op="train-step", provider="ours", again=row["fits"] is None, **settings, **row)
    telling = ("fits", "peak_reserved_gib", "step_s", "entropy", "error")
    print(name, {k: row[k] for k in telling if row.get(k) is not None}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--cap-gib", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--group", type=int, default=GROUP)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=300)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available() or args.dry_run:
        args.dry_run, args.models, args.prompt, args.completion, args.group = True, "dry", 8, 6, 4
        args.optim = "adamw_torch"
    out = Rows(args.out, args.dry_run, part="memory")
    if args.one:
        return one(args.one, args, out)
    until = time.monotonic() + 60 * args.minutes
    for name in args.models.split(","):
        key = {"op": "train-step", "provider": "ours", "model": name}
        left = until - time.monotonic()
        if out.has(**key) or left <= 0:
            continue
        try:
            subprocess.run([sys.executable, *sys.argv, "--one", name], timeout=left, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            out.add(**key, again=True, fits=None, error=reason(error))
            print(name, reason(error), flush=True)


if __name__ == "__main__":
    main()
