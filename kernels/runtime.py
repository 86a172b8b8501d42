"""What every Triton kernel here needs to know about Triton: whether it is there, and whether it is interpreted.

Modules import on machines without Triton (Windows with a CPU); their public functions then say so. Kernel modules write
`from lowvram_grpo.kernels.runtime import jit, tl` and decorate with `jit`.

A module with kernels also has `compile_cases(cc) -> list[CompileCase]`: every configuration that its launch can choose
on compute capability `cc`. The compile gate of the tests builds them all, for GPUs nobody here owns.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
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
    """`triton.jit`, or the bare function where Triton is missing: then nothing calls it.

    A product and a sum become one instruction, rounded once, unless a launch says something else: Triton 3.9 warns
    where nobody does, and the default of 3.10 is another.
    """
    if not HAS_TRITON:
        return function
    kernel = triton.jit(function)
    if not _INTERPRETED:
        kernel.run = partial(_fused, kernel.run)
    return kernel


def _fused(launch: Callable, *args: Any, **options: Any) -> Any:
    return launch(*args, **{"enable_fp_fusion": True, **options})


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import), on any device."""
    return _INTERPRETED


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """To be entered around every launch that writes beside `tensor`: Triton launches on the current device, whatever
    its arguments lie on. Nothing is done where that is the tensor's own."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


@contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    """PyTorch's sync debug mode ("default", "error") for the length of the block, without its warning that the mode is
    a prototype, which is no business of who reads a run's output. Nothing is done without CUDA, and CUDA, which takes
    memory, is not begun with for a mode that nobody can have changed."""
    if not torch.cuda.is_available() or (mode == "default" and not torch.cuda.is_initialized()):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug(mode)
        yield
    finally:
        _set_sync_debug(before)


def _set_sync_debug(mode: str | int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)


def trial(question: Callable[..., bool]) -> Callable[..., bool]:
    """A question that a device answers by running something, asked once a process for the same arguments.

    The answer must not depend on who happens to ask first: it may wait for the device whatever sync debug mode it is
    asked in, and autocast and inference mode, in which there are no gradients to try, are off meanwhile. The answer
    inside of a capture must be known before. Memory that runs out is no answer: `question` must raise it, and is asked
    again the next time.
    """

    @lru_cache
    @wraps(question)
    def ask(*args: Any) -> bool:
        with sync_debug("default"), torch.inference_mode(False), _without_autocast():
            return question(*args)

    return ask


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


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
