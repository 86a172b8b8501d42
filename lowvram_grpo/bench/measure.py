"""The peaks of each phase of real training steps, under a hard cap, in a process of its own.

    python -m lowvram_grpo.bench.measure SPEC.json RESULT.json

A fresh process has a fresh allocator: what an earlier model left in pieces would count against the next. On a GPU the
allocator is asked; on a CPU, which has none to ask, the ledger counts what PyTorch's operators make.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowvram_grpo.bench.models import random_model, word_prompts, word_tokenizer
from lowvram_grpo.bench.rows import ROOT, reason
from lowvram_grpo.errors import UserError, is_out_of_memory
from lowvram_grpo.recipe.resolve import Recipe
from lowvram_grpo.run.observer import Observer

if TYPE_CHECKING:
    from lowvram_grpo.training.trainer import GRPOTrainer

MIB = 2**20
# What runs between the phases: clipping, zeroing, the self-test before step 1.
ELSEWHERE = "elsewhere"
_PROMPTS = 64


class Peaks:
    """Peaks a phase, from an allocator that knows only its peak since it was last asked to forget.

    A phase does not count what happens in a phase inside it (forward runs backward between two micro-batches), as
    `Ledger.phase` does not.

    Args:
        seen: (allocated, reserved) peak bytes since `forget` was called.
    """

    def __init__(self, seen: Callable[[], tuple[int, int]], forget: Callable[[], None]):
        self._seen, self._forget = seen, forget
        self._open = [ELSEWHERE]
        self.phases: dict[str, tuple[int, int]] = {}
        forget()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.book()
        self._open.append(name)
        try:
            yield
        finally:
            self.book()
            self._open.pop()

    def book(self) -> None:
        """What was seen since the last time belongs to the innermost phase that is open."""
        earlier = self.phases.get(self._open[-1], (0, 0))
        self.phases[self._open[-1]] = tuple(map(max, earlier, self._seen()))
        self._forget()


class OnDevice:
    """Caps the allocator and reads its peaks.

    Args:
        budget: bytes that the process may use, CUDA context included.
    """

    def __init__(self, budget: int):
        from lowvram_grpo.memory.devices import detect
        from lowvram_grpo.memory.overheads import CUDA

        found = detect(0)  # where transformers trains
        self.total, self._free_before = found.total_bytes, found.nvml_free_bytes
        self._context = found.context_bytes or CUDA.context
        self.cap = budget - self._context
        self.device = torch.device("cuda", found.index)
        torch.cuda.set_device(self.device)
        self._peaks = Peaks(
            lambda: (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()),
            torch.cuda.reset_peak_memory_stats,
        )
        self.phase = self._peaks.phase

    def limit(self) -> None:
        """Set the hard cap (again: a trainer may have set its own)."""
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(self.cap, 1) / self.total))

    def found(self) -> dict[str, Any]:
        """MiB. The context is what the card lost beyond the allocator's own; without the driver's count from before,
        what others took counts too. Where others come and go meanwhile (LOWVRAM_BESIDE), it is what was assumed."""
        self._peaks.book()
        free, total = torch.cuda.mem_get_info()
        beside = bool(os.environ.get("LOWVRAM_BESIDE"))
        context = (self._free_before or total) - free - torch.cuda.memory_reserved()
        if beside:
            context = self._context
        peaks = self._peaks.phases
        return {
            "phases_mib": {name: _both(*peak) for name, peak in peaks.items()},
            "peak_allocated_mib": _mib(max(allocated for allocated, _ in peaks.values())),
            "peak_reserved_mib": _mib(max(reserved for _, reserved in peaks.values())),
            "context_mib": _mib(context),
            "context_known": self._free_before is not None and not beside,
            "cap_mib": _mib(self.cap),
            "host_mib": _locked(),
        }


class ByLedger:
    """Counts a CPU's tensors; there is no cap."""

    def __init__(self):
        from lowvram_grpo.memory.ledger import Ledger

        self.device, self.ledger = torch.device("cpu"), Ledger()
        self.phase = self.ledger.phase

    def limit(self) -> None:
        pass

    def found(self) -> dict[str, Any]:
        peaks = self.ledger.phases
        return {
            "phases_mib": {name: {"allocated": _mib(peak.bytes)} for name, peak in peaks.items()},
            "peak_allocated_mib": _mib(self.ledger.peak),
            "host_mib": {name: _mib(size) for name, size in self.ledger.host.items()},
        }


def _locked() -> dict[str, float]:
    """MiB of page-locked host memory at its peak, where this PyTorch counts it."""
    stats = getattr(torch.cuda, "host_memory_stats", dict)()
    peak = stats.get("allocated_bytes.peak", 0)
    return {"page-locked": _mib(peak)} if peak else {}


def _mib(size: float) -> float:
    return round(size / MIB, 2)


def _both(allocated: int, reserved: int) -> dict[str, float]:
    return {"allocated": _mib(allocated), "reserved": _mib(reserved)}


def drawn(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within every group, so that no row of the update is without a gradient."""
    return [random.random() for _ in completions]


class _Quiet(Observer):
    def notice(self, text: str) -> None:
        pass


def trainer_of(recipe: Recipe, steps: int, device: torch.device, folder: str, **more: Any) -> GRPOTrainer:
    """A trainer of a model of `recipe`'s size with random weights, and of prompts and completions of its greatest
    length, for `steps` optimizer steps that write nothing but into `folder`; `more` are further settings."""
    from datasets import Dataset

    from lowvram_grpo.jobs.loading import dtype_of, fresh_lora
    from lowvram_grpo.plan.architectures import resolve_config
    from lowvram_grpo.plan.paper import setting
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.training.trainer import GRPOTrainer

    config, _ = resolve_config(recipe.model)
    vocab = config.get_text_config().vocab_size
    completion = setting(recipe, "max_completion_length")
    data = Dataset.from_dict({"prompt": word_prompts(_PROMPTS, setting(recipe, "max_prompt_length") or 512, vocab)})
    settings = {k: v for k, v in recipe.training.items() if k not in ("bf16", "fp16", "tf32", "reward_weights")}
    settings |= {
        "fp16": recipe.dtype == "float16" and device.type == "cuda", "use_cpu": device.type == "cpu",
        "max_steps": steps, "generation_kwargs": {"min_new_tokens": completion}, "model_init_kwargs": None,
        "report_to": "none", "save_strategy": "no", "eval_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        # Memory that runs out is what is asked for here; what comes before step 1 is not.
        "oom_step_down": False, "signal_check": False, "cold_start": "off", "memory_probe": "off",
    }  # fmt: skip
    args = GRPOConfig(**{**settings, **more, "output_dir": folder})
    model = random_model(
        config, quantization=recipe.quantization, dtype=dtype_of(recipe, device), device=device,
        head_dtype=args.head_dtype, embedding_offload=args.embedding_offload, weight_offload=args.weight_offload,
        expert_offload=args.expert_offload,
    )  # fmt: skip
    return GRPOTrainer(
        model, drawn, args, data, processing_class=word_tokenizer(vocab), peft_config=fresh_lora(recipe),
        observer=_Quiet(),
    )  # fmt: skip


def train(
    recipe: Recipe, steps: int, device: torch.device, phase: Callable[[str], AbstractContextManager], limit
) -> dict:
    """Train a model of `recipe`'s size for `steps` optimizer steps of the greatest length; what it logged.

    Args:
        phase: makes the context of a phase.
        limit: called before the model is made and before the first step.
    """
    limit()
    with tempfile.TemporaryDirectory() as folder:
        with phase("load"):
            trainer = trainer_of(recipe, steps, device, folder)
        trainer.guard.watch = phase
        limit()
        trainer.train()
    logged = [row for row in trainer.state.log_history if "step_time" in row]
    last = logged[-1]
    return {
        "step_s": [row["step_time"] for row in logged],
        "loss": [row.get("loss") for row in logged],
        "tokens_per_second": last.get("tokens_per_second"),
        "entropy": last.get("entropy"),
        "completion_length": last.get("completions/mean_length"),
        "sampling_gap_max": last.get("sampling/sampling_logp_difference/max"),
    }


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out; the guard says so in a sentence of its own."""
    if isinstance(error, UserError):
        return str(error).startswith("Out of GPU memory")
    return is_out_of_memory(error)


Train = Callable[[Recipe, int, torch.device, Callable[[str], AbstractContextManager], Callable[[], None]], dict]


def measure(recipe: Recipe, budget: int, steps: int, device: str, train: Train = train) -> dict[str, Any]:
    """`fits` (None: it failed for another reason, in `error`) and what was seen up to there."""
    meter = OnDevice(budget) if device == "cuda" else ByLedger()
    row: dict[str, Any] = {"fits": True}
    with ExitStack() as stack:
        if isinstance(meter, ByLedger):
            stack.enter_context(meter.ledger)
        try:
            row |= train(recipe, steps, meter.device, meter.phase, meter.limit)
        except Exception as error:
            full = ran_out(error)
            row |= {"fits": False if full else None, "out_of_memory": full, "error": reason(error)}
            if not full:
                traceback.print_exc()
    return row | meter.found()


def apart(
    recipe: Recipe,
    budget: int,
    steps: int,
    device: str,
    seconds: float,
    script: Sequence[str] = ("-m", "lowvram_grpo.bench.measure"),
) -> dict[str, Any]:
    """`measure`, or what another `script` does with the same arguments, in a process of its own that is stopped after
    `seconds`. With several cards, the one with the most free memory."""
    from lowvram_grpo.memory.devices import growing_segments, pin_card

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    pin_card(environment)
    growing_segments(environment)
    spec = {"recipe": asdict(recipe), "budget": budget, "steps": steps, "device": device}
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "spec.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(spec, default=str), encoding="utf-8")
        command = [sys.executable, *script, str(asked), str(told)]
        try:
            done = subprocess.run(
                command, env=environment, timeout=seconds, capture_output=True, text=True, encoding="utf-8",
                errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"fits": None, "error": f"stopped after {seconds:.0f} s", "again": True}
        if told.is_file():
            row = json.loads(told.read_text(encoding="utf-8"))
            if row["fits"] is None:
                row |= {"again": True, "trace": done.stderr[-2000:]}
            return row
        return {"fits": None, "error": f"exit code {done.returncode}", "trace": done.stderr[-2000:], "again": True}


def main(train: Train = train) -> None:
    from lowvram_grpo.run.quiet import hush

    hush()
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    row = measure(Recipe(**spec["recipe"]), spec["budget"], spec["steps"], spec["device"], train)
    Path(sys.argv[2]).write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main()
