"""The frozen linear layer under a LoRA adapter, as two products: its output, and the gradient to its input.

bitsandbytes multiplies few rows by a 4-bit weight in one kernel, and makes the weight dense for many, in three launches
where its scales are quantized themselves. `kernels/layer/nf4_dense.py` takes one, forward and backward, of the
same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowvram_grpo.kernels.layer.nf4_dense import dense_nf4, fits
from lowvram_grpo.policy.own_forward import has_foreign_forward, is_watched

# By name, so that bitsandbytes need not be there. Exact types: a subclass may compute something else.
_LINEAR, _FOUR_BIT = ("torch.nn.modules.linear", "Linear"), ("bitsandbytes.nn.modules", "Linear4bit")
# Above this many rows no card of bitsandbytes' list multiplies without making the weight dense (its _custom_max_m).
DENSE_ROWS = 1536


def knows(base: nn.Module) -> bool:
    """Whether `product` and `product_back` are all that this layer does."""
    kind = type(base).__module__, type(base).__name__
    if kind not in (_LINEAR, _FOUR_BIT) or is_touched(base) or any(p.requires_grad for p in base.parameters()):
        return False
    if kind == _LINEAR:
        return base.weight.is_floating_point()
    state = getattr(base.weight, "quant_state", None)
    return state is not None and len(state.shape) == 2 and not getattr(state, "packing_format_for_cpu", False)


def is_touched(base: nn.Module) -> bool:
    """Whether somebody has to do with a layer since `knows` was asked: watches it, or trains it."""
    return has_foreign_forward(base) or is_watched(base) or base.weight.requires_grad


def _is_plain(base: nn.Module) -> bool:
    return type(base) is nn.Linear


def product(base: nn.Module, x: Tensor, kernel: bool) -> Tensor:
    """(..., O) of x (..., I), without a graph, as `base` would answer under autocast or without.

    Args:
        kernel: `nf4_dense` runs on this device.
    """
    if _is_plain(base) or not kernel or x.numel() <= DENSE_ROWS * x.shape[-1] or not base.compute_type_is_set:
        return base(x)
    state = base.weight.quant_state
    if not fits(base.weight, state):
        return base(x)
    dtype = base.compute_dtype or x.dtype
    bias = None if base.bias is None else base.bias.to(dtype)
    return torch.nn.functional.linear(x.to(dtype), dense_nf4(base.weight, state, dtype), bias).to(x.dtype)


def product_back(base: nn.Module, dy: Tensor, kernel: bool, total: Tensor | None = None) -> Tensor:
    """(N, I): dy (N, O) times the weight in dy's dtype, added to `total` in place where there is one."""
    weight = _dense(base, dy.dtype, kernel)
    return torch.mm(dy, weight) if total is None else add_product(total, dy, weight)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b in place, in one launch where they have one dtype."""
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    return total.add_(torch.mm(a, b))


def _dense(base: nn.Module, dtype: torch.dtype, kernel: bool) -> Tensor:
    """(O, I)"""
    if _is_plain(base):
        return base.weight.detach().to(dtype)
    state = base.weight.quant_state
    if kernel and fits(base.weight, state):
        return dense_nf4(base.weight, state, dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.detach().view(-1, 1), state).to(dtype)
