"""Models whose LoRA layers compute in few launches, and counts of what they launch."""

from __future__ import annotations

import torch
from passes import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_grpo.policy.fused_lora import fuse_lora
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm
from lowvram_grpo.policy.wrapper import unwrap

IDS = torch.randint(3, 41, (2, 9), generator=torch.Generator().manual_seed(4))
# Widths that bitsandbytes' blocks fit into: its operator for CPUs takes the wrong scales where a block ends in another
# row than it begins in (0.50).
BIG = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def fused(model):
    assert fuse_lora(model, nf4_kernel=False) > 0
    return model


def states(model, **kwargs):
    with torch.no_grad():
        return unwrap(model).model(IDS, **kwargs).last_hidden_state


def four_bit(tmp_path, dtype=torch.float32):
    tiny("Llama", **BIG).save_pretrained(tmp_path)
    config = bitsandbytes_config("nf4", dtype)
    return load_causal_lm(str(tmp_path), device=torch.device("cpu"), dtype=dtype, quantization_config=config)


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
