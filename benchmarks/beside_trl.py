"""Memory and CPU time of steps of TRL's GRPOTrainer, as it is and with `lowvram_grpo.integrations.trl` switched on.

    python benchmarks/beside_trl.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Each side runs in processes of its own, in turn, so that the machine's mood falls on both. Of each step it takes, for
sampling and for all the rest (scoring, gradient, optimizer), the CPU seconds of the process and its largest resident
memory, weights and libraries included (Linux's VmHWM, set back in between). Completions have a fixed length and the
same prompts; LoRA on all linear layers, beta 0.04, float32.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = {"trl": (False, False), "logps": (True, False), "engine": (False, True), "both": (True, True)}
FIGURES = ("sampling_s", "rest_s", "sampling_mib", "rest_mib")


class Meter:
    """CPU seconds and the peak of resident memory since `start`, in MiB."""

    def start(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier part has freed and glibc has kept
        Path("/proc/self/clear_refs").write_text("5")
        self.cpu = time.process_time()

    def read(self) -> tuple[float, float]:
        return time.process_time() - self.cpu, _status("VmHWM")


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One side: a step that is not counted, and one that is."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    words = ["river", "stone", "light", "paper", "garden", "winter", "copper", "letter", "window", "bridge"]
    prompts = [" ".join(words[(i * 7 + j * j) % 10] for j in range(options.prompt - 3 * (i % 4))) for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, max_steps=2, num_generations=options.group,
            per_device_train_batch_size=options.group, gradient_accumulation_steps=2,
            max_completion_length=options.completion, generation_kwargs={"min_new_tokens": options.completion},
            beta=0.04, gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}, learning_rate=1e-5,
            report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, seed=1,
        )  # fmt: skip
        trainer = GRPOTrainer(
            options.model, [lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions]], args,
            Dataset.from_dict({"prompt": prompts}),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
        logps, engine = SIDES[options.side]
        if logps or engine:
            from lowvram_grpo.integrations.trl import switch_on

            switch_on(trainer, logps=logps, engine=engine)
        steps: list[dict[str, float]] = []
        meter = Meter()
        sample, step = trainer._generate_single_turn, trainer.training_step

        def sampled(*given: Any, **named: Any) -> Any:
            meter.start()
            out = sample(*given, **named)
            seconds, mib = meter.read()
            steps.append({"sampling_s": seconds, "sampling_mib": mib, "rest_s": 0.0, "rest_mib": 0.0})
            meter.start()
            return out

        def trained(*given: Any, **named: Any) -> Any:
            meter.start()
            out = step(*given, **named)
            seconds, mib = meter.read()
            steps[-1]["rest_s"] += seconds
            steps[-1]["rest_mib"] = max(steps[-1]["rest_mib"], mib)
            return out

        trainer._generate_single_turn, trainer.training_step = sampled, trained
        torch.manual_seed(1)
        trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {**steps[-1], "grad_norm": log[0]["grad_norm"], "loss": log[0]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group", type=int, default=4, help="completions of a prompt; a step has two prompts")
    parser.add_argument("--prompt", type=int, default=60, help="words of the longest prompt")
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--sides", nargs="+", default=["trl", "both"], choices=SIDES)
    parser.add_argument("--side", choices=SIDES, help="this process is one side")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(child(options)))
        return
    given = [f"--{name}={getattr(options, name)}" for name in ("model", "group", "prompt", "completion")]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            done = subprocess.run(
                [sys.executable, __file__, f"--side={side}", *given], stdout=subprocess.PIPE, text=True, check=True
            )
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, found[side][-1], file=sys.stderr, flush=True)
    print(f"| {Path(options.model).name} | {' | '.join(FIGURES)} |\n|---|{'---|' * len(FIGURES)}")
    for side, rows in found.items():
        print(f"| {side} | {' | '.join(f'{statistics.median(row[n] for row in rows):.1f}' for n in FIGURES)} |")
    first = found[options.sides[0]]
    for side in options.sides[1:]:
        ratios = [statistics.median(b[n] / a[n] for a, b in zip(first, found[side])) for n in FIGURES]
        print(f"| {side} / {options.sides[0]}, pair by pair | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


if __name__ == "__main__":
    main()
