"""Products of hidden states and weights, accumulated in float32 whatever their dtype: of the sweep that scores and of
the logits that are sampled from, so that both see the same numbers."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowvram_grpo.errors import is_out_of_memory


def compute_dtype(hidden: Tensor, path: str | None = None) -> torch.dtype:
    """The dtype of the matmuls: that of 16-bit hidden states on a GPU (or autocast's), else float32."""
    device = hidden.device.type
    if device == "cpu" and path in (None, "torch"):
        return torch.float32
    if device == "cuda" and hidden.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.float32 if hidden.dtype == torch.float64 else hidden.dtype


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast would quietly turn the float32 products of the sweep into bfloat16 ones."""
    device = tensor.device.type
    return torch.autocast(device if device != "meta" else "cpu", enabled=False)


@cache
def _accumulates(device: torch.device) -> bool:
    """Whether 16-bit products can be added to a float32 tensor in one call; torch 2.9 refuses (pytorch #167931)."""
    half, total = torch.zeros(8, 8, dtype=torch.float16, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, half, half, torch.float32, out=total)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into float32 `out`, accumulated in float32 whatever a and b are."""
    if out.is_meta:
        return out
    if out.is_cuda and a.dtype != torch.float32:
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, in float32."""
    if total.is_meta:
        return total
    if total.is_cuda and a.dtype != torch.float32:
        if not _accumulates(total.device):
            return total.add_(torch.ops.aten.mm.dtype(a, b, torch.float32))
        return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    return torch.addmm(total, a.float(), b.float(), out=total)
