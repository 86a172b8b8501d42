"""Which 16-bit dtypes a CPU multiplies in hardware, and what to say to whoever asks for one that it does not.

Without the instructions, products fall back to conversions or to plain loops. 256 x 896 x 4,864 on one core of an EPYC
against float32 (docs/LOG.md): bfloat16 2.5 times as slow with AVX512 alone and 4.4 times with AVX2, float16 4.5 times;
where the CPU has AVX512-BF16, bfloat16 is twice as fast.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from lowvram_grpo.recipe.config import GRPOConfig


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in `dtype`. Yes where this torch can't tell."""
    if dtype == torch.bfloat16 and platform.machine().lower() in ("x86_64", "amd64"):
        # mkldnn's own question is content with AVX512, which emulates.
        asked = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
        return any(ask is None or ask() for ask in asked)
    if dtype in (torch.bfloat16, torch.float16):
        ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported", None)
        return ask is None or ask()
    return True


def auto_dtype(asked: Any, stored: torch.dtype | None, device: torch.device) -> Any:
    """The dtype for transformers' "auto" (that of the checkpoint): float32 on a CPU that does not multiply in it."""
    if asked != "auto" or device.type != "cpu" or (stored is not None and cpu_multiplies(stored)):
        return asked
    return torch.float32


def slow_dtype(model: nn.Module, args: GRPOConfig) -> str | None:
    """A sentence where `model`, or autocast over it, computes in a dtype that this CPU does not multiply in."""
    if args.device.type != "cpu":
        return None
    weights = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    if weights is not None and not cpu_multiplies(weights):
        name = str(weights).removeprefix("torch.")
        where, mend = f"the model is in {name}", "pass --dtype float32 (in a script, load the model in float32)"
    elif args.bf16 and not cpu_multiplies(torch.bfloat16):
        name, where, mend = "bfloat16", "bf16 is on", "drop --bf16 and leave the model in float32"
    else:
        return None
    return f"{where}, which this CPU has no instructions for: products take two to four times as long; {mend}."
