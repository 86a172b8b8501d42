"""The models that rollouts are measured with."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from lowvram_grpo.bench.models import random_model
from lowvram_grpo.bench.rows import ROOT
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.load import load_causal_lm
from lowvram_grpo.policy.quantization import bitsandbytes_config

# The bundled model, for dry runs.
DRY_MODEL = str(ROOT / "lowvram_grpo" / "demo" / "model")


def load(name: str, weights: str, rank: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model in eval mode, with an adapter of this rank that is not zero (0: none)."""
    if any(Path(name).glob("*.safetensors")):
        config = bitsandbytes_config(weights, dtype)
        model = load_causal_lm(name, device=device, dtype=dtype, quantization_config=config)
        model = model.to(device) if config is None else model
    else:
        model = random_model(resolve_config(name)[0], quantization=weights, dtype=dtype, device=device)
    if rank:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = attach_lora(model, lora)
        generator = torch.Generator(device).manual_seed(0)
        for key, weight in model.named_parameters():
            if ".lora_B." in key:
                nn.init.normal_(weight, std=0.005, generator=generator)
    return model.eval()
