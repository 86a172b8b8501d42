"""Which of the kernels for small operations are taken here: asked for or measured faster, and proven on this device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lowvram_grpo.kernels import decode_ops, gradient_ops
from lowvram_grpo.kernels.decode_ops import rms_norm, rms_norm_ref, rope, rope_ref, swiglu, swiglu_ref
from lowvram_grpo.kernels.logits import linear_logits
from lowvram_grpo.kernels.nf4_dense import dense_nf4
from lowvram_grpo.kernels.quantized import Int8Weight
from lowvram_grpo.kernels.sample import block_masses, block_masses_ref
from lowvram_grpo.policy.head import Head

MODES = ("auto", "on", "off")
# What `auto` takes: kinds that benchmarks/bench_decode_ops.py has measured faster than eager code on a card. None yet.
MEASURED_FASTER: tuple[str, ...] = ()


def wanted(kind: str, enabled: str) -> bool:
    """Whether a kind of kernel (one of small_ops.KINDS, `sample` or `int8_head`) is asked for, or has been measured
    faster."""
    return enabled == "on" or (enabled == "auto" and (kind in MEASURED_FASTER or kind in TRAINING_TRIALS))


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
        if kind in TRAINING_TRIALS:
            found, expected = TRAINING_TRIALS[kind](x)
        elif kind == "rms_norm":
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


def _with_gradients(kernel: Callable, reference: Callable, arguments: Callable[[Tensor], tuple], trained: int):
    """Results, and gradients to the first `trained` arguments, in one tensor."""

    def ask(x: Tensor) -> tuple[Tensor, Tensor]:
        return _and_gradients(kernel, arguments(x), trained), _and_gradients(reference, arguments(x), trained)

    return ask


@torch.enable_grad()
def _and_gradients(function: Callable, arguments: tuple, trained: int) -> Tensor:
    inputs = [x.detach().clone().requires_grad_() for x in arguments[:trained]]
    outs = function(*inputs, *arguments[trained:])
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    dys = [out.detach().flip(0) for out in outs]
    return torch.cat([x.detach().flatten().float() for x in (*outs, *torch.autograd.grad(outs, inputs, dys))])


def _nf4_dense(x: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(x[0].flatten(), quant_type="nf4", blocksize=64, compress_statistics=True)
    return dense_nf4(packed, state, x.dtype), dequantize_4bit(packed, state).view(state.shape)


# Kernels of training passes, of each as in `runs`: from random numbers (3, 4, 5, 64) what it finds, and what is
# expected. Modelled, not measured: `auto` takes them where their trial is passed, as no card can overturn what follows
# from counting (rms_norm one launch for 7 forward and about 15 back, swiglu one for 2 and 6, rope one for 10 and 18,
# nf4_dense one for 3, each reading and writing fewer bytes).
TRAINING_TRIALS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "rms_norm_grad": _with_gradients(gradient_ops.rms_norm, rms_norm_ref, lambda x: (x, x[0, 0, 0], 1e-6), 1),
    "swiglu_grad": _with_gradients(gradient_ops.swiglu, swiglu_ref, lambda x: (x, x + 1), 2),
    "rope_grad": _with_gradients(gradient_ops.rope, rope_ref, lambda x: (x, x[:, :1], x[:, 0], x[:, 1]), 2),
    "nf4_dense": _nf4_dense,
}
