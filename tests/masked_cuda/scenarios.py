"""Short GRPO runs of a tiny model on the masked card, or on the CPU beside it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from lowvram_grpo import GRPOConfig, GRPOTrainer
from lowvram_grpo.policy.load import bitsandbytes_config
from lowvram_grpo.recipe import preset
from tests.conftest import Quiet, digit_share, make_model, make_tokenizer
from tests.masked_cuda.record import RECORD

HALF = "fp16" if os.environ.get("MASKED_CC") == "7.5" else "bf16"
PROMPTS = [f"a b {i % 10} c" if i % 2 else f"{i % 10} d e f g h" for i in range(16)]


@dataclass
class Outcome:
    """Log rows of the steps, trained weights on the CPU, the trainer."""

    rows: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    trainer: GRPOTrainer


def trained(
    *, on: str = "cuda", dtype: str = "float32", quantization: str = "none", lora: bool = True, steps: int = 2,
    model: dict[str, Any] | None = None, before: Callable[[GRPOTrainer], None] = lambda trainer: None, **settings: Any,
) -> Outcome:  # fmt: skip
    """A run of `steps` steps.

    Args:
        on: cuda or cpu.
        dtype: float32, or what is computed in under autocast: bf16, fp16.
        model: settings of the tiny Llama.
        before: gets the trainer before it trains.
    """
    with tempfile.TemporaryDirectory() as folder:
        tiny = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False, **(model or {})}
        make_model(**tiny).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        fixed = {
            "output_dir": os.path.join(folder, "run"), "max_steps": steps, "num_generations": 4, "prompts_per_step": 2,
            "per_device_train_batch_size": 4, "max_prompt_length": 16, "max_completion_length": 6, "report_to": "none",
            "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3, "disable_tqdm": True, "seed": 1,
            "use_cpu": on == "cpu", "bf16": dtype == "bf16", "fp16": dtype == "fp16",
            # Unset, a card's weights would be in 16 bits.
            "model_init_kwargs": {"dtype": "float32"} if dtype == "float32" else None,
        }  # fmt: skip
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = GRPOTrainer(
            folder, digit_share, GRPOConfig(**{**fixed, **settings}), Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=make_tokenizer(), observer=Quiet(),
            peft_config=adapter if lora else None,
            quantization_config=None if quantization == "none" else bitsandbytes_config(quantization, half),
        )  # fmt: skip
        before(trainer)
        trainer.train()
    assert {p.device.type for p in trainer.model.parameters() if p.requires_grad} == {on}
    weights = {n: p.detach().cpu() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return Outcome([row for row in trainer.state.log_history if "loss" in row], weights, trainer)


def of_preset(name: str) -> dict[str, Any]:
    """Its settings as `trained` takes them: `dtype` and the number of prompts are the caller's."""
    return {k: v for k, v in preset.load(name).settings.items() if k not in ("dtype", "prompts_per_step")}


@contextmanager
def full_once(trainer: GRPOTrainer, phase: str, after: int = 1):
    """The device is full once: at operator `after` of `phase` (of a capture, where that is its name). Yields a list
    that gets the operator's name."""
    hit, seen = [], []

    def fault(name: str) -> None:
        there = RECORD.capturing is not None if phase == "capture" else trainer.guard._phase == phase
        if hit or not there:
            return
        seen.append(name)
        if len(seen) == after:
            hit.append(name)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")

    RECORD.fault = fault
    try:
        yield hit
    finally:
        RECORD.fault = None


def full_in_training(phase: str, after: int) -> tuple[Callable[[GRPOTrainer], None], list[str]]:
    """(`before` of `trained`, which makes the card full once while it trains; the operators that met it)."""
    hits: list[str] = []

    def before(trainer: GRPOTrainer) -> None:
        train = trainer.train

        def once(*args, **kwargs):
            with full_once(trainer, phase, after) as hit:
                train(*args, **kwargs)
            hits.extend(hit)

        trainer.train = once

    return before, hits
