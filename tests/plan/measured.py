"""A real training run on the CPU, counted by the ledger phase by phase."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from lowvram_grpo import GRPOConfig, GRPOTrainer
from lowvram_grpo.memory.ledger import Ledger, Peak
from lowvram_grpo.policy.embeddings import stays_on_host
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm
from tests.conftest import Quiet


def drawn(completions, **_):
    """Differs within every group, so that every row of the update has a gradient."""
    return [random.random() for _ in completions]


def measured(
    folder: str, args: GRPOConfig, tokenizer, prompts: list[str], quantization: str, lora: dict | None
) -> dict[str, Peak]:
    """Peaks of a run on `prompts`, over and over, whose completions are all of full length. Without `lora` all weights
    are trained."""
    return ledger_of(folder, args, tokenizer, prompts, quantization, lora).phases


def ledger_of(
    folder: str, args: GRPOConfig, tokenizer, prompts: list[str], quantization: str, lora: dict | None
) -> Ledger:
    """The ledger of such a run."""
    from datasets import Dataset
    from peft import LoraConfig

    data = Dataset.from_dict({"prompt": prompts * 8})
    ledger = Ledger(device="cpu")
    with ledger:
        with ledger.phase("load"):
            model = load_causal_lm(
                folder, device=torch.device("cpu"), dtype=torch.float32,
                quantization_config=bitsandbytes_config(quantization, torch.float32),
                keep_on_host=lambda model: stays_on_host(model, args.head_dtype, args.embedding_offload),
                expert_offload=args.expert_offload,
                weight_offload=args.weight_offload,
            )  # fmt: skip
            trainer = GRPOTrainer(
                model, drawn, args, data, processing_class=tokenizer, observer=Quiet(),
                peft_config=None if lora is None else LoraConfig(**lora, task_type="CAUSAL_LM"),
            )  # fmt: skip
        trainer.guard.watch = ledger.phase
        trainer.train()
    return ledger


def settings(folder: Path, **overrides) -> GRPOConfig:
    """A config whose completions never end early, for runs of two steps."""
    given = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "max_steps": 2, "save_strategy": "no",
        "disable_tqdm": True, "signal_check": False, "self_test": False, "memory_probe": "off",
    }  # fmt: skip
    args = GRPOConfig(**{**given, **overrides})
    args.generation_kwargs = {"min_new_tokens": args.max_completion_length}
    return args
