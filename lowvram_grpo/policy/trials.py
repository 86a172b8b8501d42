"""Which of the kernels for small operations are taken here: asked for or measured faster, and proven on this device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lowvram_grpo.kernels import decode_ops
from lowvram_grpo.kernels.decode_ops import rms_norm, rms_norm_ref, rope, rope_ref, swiglu, swiglu_ref
from lowvram_grpo.kernels.logits import linear_logits
from lowvram_grpo.kernels.quantized import Int8Weight
from lowvram_grpo.kernels.sample import block_masses, block_masses_ref
from lowvram_grpo.policy.head import Head

MODES = ("auto", "on", "off")
# What `auto` takes: kinds that benchmarks/bench_decode_ops.py has measured faster than eager code on a card. None yet.
MEASURED_FASTER: tuple[str, ...] = ()


def wanted(kind: str, enabled: str) -> bool:
    """Whether a kind of kernel (one of small_ops.KINDS, `sample` or `int8_head`) is asked for, or has been measured
    faster."""
    return enabled == "on" or (enabled == "auto" and kind in MEASURED_FASTER)


def usable(kind: str, device: torch.device, enabled: str) -> bool:
    """Whether a kernel that replaces no module (`sample`, `int8_head`) is wanted, and runs on this device."""
    dtype = torch.float32 if kind == "sample" else torch.float16
    return wanted(kind, enabled) and runs(kind, device, dtype)


@lru_cache
def runs(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel compiles here and is right: asked once a process, since Triton needs more than a GPU, and
    bfloat16 more than an old one. Without the kernel there is nothing to gain on CUDA."""
    if device.type != "cuda":
        return True
    x = random_numbers(3, 4, 5, 64).to(device, dtype)
    if not decode_ops.uses_triton(x):
        return False
    try:
        if kind == "rms_norm":
            found, expected = (f(x, x[0, 0, 0], 1e-6) for f in (rms_norm, rms_norm_ref))
        elif kind == "sample":
            found, expected = (f(x[0, 0].float())[0] for f in (block_masses, block_masses_ref))
        elif kind == "int8_head":
            head = Head(Int8Weight.quantize(x[1, 0]))
            found, expected = (linear_logits(x[0, 0], head, fused=fused) for fused in (True, False))
        elif kind == "swiglu":
            found, expected = (f(x, x + 1) for f in (swiglu, swiglu_ref))
        else:
            found, expected = (torch.cat(f(x, x[:, :1], x[:, 0], x[:, 1]), 1) for f in (rope, rope_ref))
        near = 1e-4 if dtype == torch.float32 else 0.02
        return torch.allclose(found.float(), expected.float(), rtol=near, atol=near)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a compiler that is missing, a driver too old: eager code still runs
        return False


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    """float32 on the CPU; the global generator stays where it is."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
