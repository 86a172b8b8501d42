"""Does everything run on this device at all? One row a check, with the whole traceback of what does not.

    python benchmarks/part_smoke.py --out rows.jsonl [--checks imports preset:8gb ...] [--minutes 2]

Checks:

    imports       every package that the suite and the program use, and its version
    preset:NAME   one training step with the settings of that preset: a model of Qwen2.5-0.5B's size, random weights
    graphs:HEAD   a rollout by CUDA graphs and by the same steps launched one by one, with a dense or an int8 head
    fused         a rollout with every kernel for small operations, and one without: the same tokens, nearly
    oom           two steps; after the first the allocator may have less than the first took, and the guard has to act

A failed check fails nothing here. Without a GPU: the bundled model, and an error that is thrown where memory would run
out.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from attempts import Attempts

from lowvram_grpo.bench.rows import LOST, ROOT, Rows, context_is_lost, reason

MODEL = "Qwen2.5-0.5B"
DRY_MODEL = str(ROOT / "lowvram_grpo" / "demo" / "model")
PRESETS = ("8gb", "4gb", "6gb", "12gb", "16gb", "24gb")
CHECKS = ("imports", *(f"preset:{name}" for name in PRESETS), "graphs:dense", "graphs:int8", "fused", "oom")
NEEDED = ("triton", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "safetensors", "tokenizers",
          "rich", "typer", "yaml", "psutil", "math_verify", "pytest", "matplotlib")  # fmt: skip
# What is measured beside ours, or used where it is there.
WELCOME = ("trl", "liger_kernel", "unsloth_zoo", "cut_cross_entropy", "xformers", "gguf", "pynvml", "tomli_w")
# A quarter of the completions may differ: a graph's products may be cut in another way.
ALIKE = 0.75


class Check:
    """What the checks share."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.model = DRY_MODEL if dry_run else MODEL

    def flags(self, preset: str, **more: Any) -> dict[str, Any]:
        flags = {"model": self.model, "preset": preset, "num_generations": 8, "prompts_per_step": 2,
                 "max_prompt_length": 96, "max_completion_length": 48}  # fmt: skip
        if self.dry_run:
            flags |= {"num_generations": 4, "max_prompt_length": 8, "max_completion_length": 6}
        if not self.cuda:
            flags |= {"quantization": "none", "head_dtype": "dense", "embedding_offload": False, "optim": "adamw_torch"}
        return {**flags, **more}

    def imports(self) -> dict[str, Any]:
        found, missing = {}, []
        for name in (*NEEDED, *WELCOME):
            if name == "unsloth_zoo" and importlib.util.find_spec(name):
                found[name] = version("unsloth-zoo")  # importing it patches transformers
                continue
            try:
                importlib.import_module(name)
                found[name] = version({"yaml": "pyyaml", "pynvml": "nvidia-ml-py"}.get(name, name.replace("_", "-")))
            except PackageNotFoundError:
                found[name] = "there"
            except Exception as error:  # a package that is broken is as good as none
                missing.append(f"{name} ({reason(error)})")
        import lowvram_grpo.training.trainer  # noqa: F401

        wrong = [one for one in missing if one.split(" ")[0] in NEEDED]
        if wrong and not self.dry_run:
            raise ImportError(f"needed and not importable: {'; '.join(wrong)}")
        return {"found": found, "missing": missing}

    def preset(self, name: str) -> dict[str, Any]:
        from lowvram_grpo.bench.measure import train
        from lowvram_grpo.recipe.resolve import resolve

        recipe = resolve(self.flags(name))
        found = train(recipe, 1, self.device, lambda phase: nullcontext(), lambda: None)
        assert math.isfinite(found["loss"][0]), f"loss {found['loss']}"
        gap = found["sampling_gap_max"]
        assert gap is None or gap < 1.0, f"a sampled token's log-prob is {gap} nats from its scored one"
        return found

    def _rollout_model(self) -> torch.nn.Module:
        from rollout_model import load

        from lowvram_grpo.policy.load import compute_dtype

        self.dtype = compute_dtype(self.device)
        return load(self.model, "nf4" if self.cuda else "none", 16, self.dtype, self.device)

    def _task(self) -> Any:
        from rollout_providers import Task

        length = 6 if self.dry_run else 40
        return Task([list(range(3, 3 + 2 * length)), list(range(9, 9 + length))], 4, length, greedy=False)

    def _autocast(self):
        return torch.autocast("cuda", self.dtype) if self.cuda else nullcontext()

    def graphs(self, head: str) -> dict[str, Any]:
        from rollout_providers import has_graphs, replay_is_eager

        from lowvram_grpo.policy.embeddings import place_embeddings
        from lowvram_grpo.policy.wrapper import unwrap

        model = self._rollout_model()
        place_embeddings(unwrap(model), head_dtype=head, embedding_offload=False, device=self.device, dtype=self.dtype)
        with self._autocast():
            found = replay_is_eager(model, self._task())
        assert found["graphs"] or not has_graphs(self.device), f"nothing was captured: {found}"
        assert found["completions_equal"] >= ALIKE * found["of"], f"{found}"
        return found

    def fused(self) -> dict[str, Any]:
        from rollout_providers import ours

        model, task = self._rollout_model(), self._task()
        with self._autocast():
            on, off = (ours(model, task, fused_ops=how).completions for how in ("on", "off"))
        same = sum(a == b for x, y in zip(on, off) for a, b in zip(x, y)) / sum(map(len, off))
        # Rounding draws another token now and then, and all behind it differ.
        assert same > 0.3, f"only {same:.0%} of the tokens are the same"
        return {"tokens_equal": same}

    def oom(self) -> dict[str, Any]:
        from transformers import TrainerCallback

        from lowvram_grpo.bench.measure import trainer_of
        from lowvram_grpo.recipe.resolve import resolve

        check = self

        class Less(TrainerCallback):
            """From the second step on there is less than the first took."""

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    check._lower(trainer)

        size = {} if self.dry_run else {"max_prompt_length": 256, "max_completion_length": 128}
        recipe = resolve(self.flags("8gb", per_device_train_batch_size=8, **size))
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(recipe, 2, self.device, folder, oom_step_down=True)
            trainer.guard.active = True  # off without CUDA
            trainer.add_callback(Less())
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
        events = [f"{event.phase}: {event.rung}" for event in trainer.guard.events]
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert events, "the guard did not have to act"
        assert len(losses) == 2 and all(map(math.isfinite, losses)), f"losses {losses}"
        return {"events": events, "loss": losses, **self._limit}

    def _lower(self, trainer: Any) -> None:
        """Of what the first step took on top of what stays, six tenths are left."""
        self._limit: dict[str, Any] = {}
        stays = peak = 0
        if self.cuda:
            torch.cuda.empty_cache()
            stays, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        if peak > stays:
            allowed = stays + 0.6 * (peak - stays)
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
            self._limit = {"stays_mib": stays / 2**20, "peak_mib": peak / 2**20, "allowed_mib": allowed / 2**20}
            return
        loss, thrown = trainer.learner.loss, []

        def once(micro):
            if not thrown:
                thrown.append(True)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. (thrown by the check)")
            return loss(micro)

        trainer.learner.loss = once


def run(name: str, check: Check, attempts: Attempts) -> None:
    kind, _, of = name.partition(":")
    call: Callable[..., dict[str, Any]] = getattr(check, kind)
    attempts.begin(name)
    try:
        found = call(*([of] if of else []))
        attempts.end(name, "passed", **found)
    except Exception as error:
        lost = context_is_lost()
        attempts.end(name, "failed", error=reason(error), trace=traceback.format_exc(), lost=lost)
        print(f"{name}: FAILED", traceback.format_exc(), flush=True)
        if lost:
            sys.exit(LOST)
        return
    print(f"{name}: passed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checks", nargs="+", default=list(CHECKS))
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        parser.error(f"unknown checks {', '.join(sorted(unknown))}; checks: {', '.join(CHECKS)}")
    until = time.monotonic() + 60 * args.minutes
    args.dry_run = args.dry_run or not torch.cuda.is_available()
    attempts, check = Attempts(Rows(args.out, args.dry_run, part="smoke")), Check(args.dry_run)
    for name in args.checks:
        if attempts.waiting(name) and time.monotonic() < until:
            run(name, check, attempts)
            if torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(1.0)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
