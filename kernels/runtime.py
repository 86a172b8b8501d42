"""What every Triton kernel here needs to know about Triton: whether it is there, and whether it is interpreted.

Modules import on machines without Triton (Windows with a CPU); their public functions then say so. Kernel modules write
`from lowvram_grpo.kernels.runtime import jit, tl` and decorate with `jit`.

A module with kernels also has `compile_cases(cc) -> list[CompileCase]`: every configuration that its launch can choose
on compute capability `cc`. The compile gate of the tests builds them all, for GPUs nobody here owns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

HAS_TRITON = triton is not None
# Triton decides when a kernel is decorated; a variable that changes afterwards changes nothing.
_INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
_HERE = nullcontext()


def jit(function: Callable) -> Any:
    """`triton.jit`, or the bare function where Triton is missing: then nothing calls it."""
    return triton.jit(function) if HAS_TRITON else function


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import), on any device."""
    return _INTERPRETED


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """To be entered around every launch that writes beside `tensor`: Triton launches on the current device, whatever
    its arguments lie on. Nothing is done where that is the tensor's own."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def require_triton(what: str, tensor: Tensor, instead: str) -> None:
    """Raises RuntimeError, in one sentence, where a kernel cannot run on `tensor`; `instead` names what can."""
    if not HAS_TRITON:
        raise RuntimeError(f"{what} needs Triton, which is not installed here; use {instead}.")
    if not (tensor.is_cuda or interpreted()):
        raise RuntimeError(
            f"{what} runs on a GPU, not on {tensor.device.type}; use {instead}, or set TRITON_INTERPRET=1."
        )


@dataclass(frozen=True)
class CompileCase:
    """One configuration of one kernel.

    Attributes:
        name: says which configuration it is, in a report.
        kernel: the `jit` function.
        signature: type of every parameter by name, in order: "*fp32", "i32", "fp32", "constexpr"; ":16" behind a type
            says that the value is divisible by 16, as Triton's launcher finds out about most pointers.
        constexprs: values of the "constexpr" ones.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1


def compile_case(
    name: str, kernel: Any, types: dict[str, str | None], constexprs: dict[str, Any], num_warps: int = 4, num_stages=1
) -> CompileCase:
    """A CompileCase from the types of the runtime arguments in any order; a pointer of type None is absent."""
    constants = {**constexprs, **{name: None for name, kind in types.items() if kind is None}}
    signature = {p: "constexpr" if p in constants else types[p] for p in inspect.signature(kernel.fn).parameters}
    return CompileCase(name, kernel, signature, constants, num_warps, num_stages)
