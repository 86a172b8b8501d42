"""Triton kernels on masked tensors: each launch is noted with its types, then computed by Triton's interpreter.

The project believes that its kernels are compiled, so it chooses tiles as on the card that is played. What a launch
would have been compiled from is kept in `LAUNCHES`; `compiled.py` compares it with the compile gate's cases.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch.utils._mode_utils import no_dispatch
from triton.runtime import interpreter

from tests.interpreter import patch_once
from tests.masked_cuda.device import Masked, inner
from tests.masked_cuda.record import RECORD, CudaError, where

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
# Constants of kernels that make them fit for the interpreter; compiled ones are launched without.
_FOR_THE_INTERPRETER = ("INTERPRET", "UPCAST")


@dataclass(frozen=True)
class Launch:
    """What Triton would have compiled.

    Attributes:
        module, kernel: its function.
        types: of the arguments that are no constants, as in `CompileCase.signature`.
        constants: values of `tl.constexpr` parameters and of absent tensors (None).
    """

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int | None


# The line that made each for the first time, and the test.
LAUNCHES: dict[Launch, tuple[str, str]] = {}
_in_name_only: list[bool] = []


def watch() -> None:
    """Note every launch from now on."""
    _round_bfloat16()
    patch_once()
    computed = interpreter.InterpretedFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        given = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
        if not any(isinstance(x, Masked) for x in given.values()):
            return computed(self, *args, grid=grid, warmup=warmup, **kwargs)
        _check(self.__name__, given, grid(given) if callable(grid) else tuple(grid))
        if RECORD.fault is not None:
            RECORD.fault(self.__name__)
        RECORD.launches[self.__name__] += 1
        LAUNCHES.setdefault(_launch(self, given, kwargs), (where(), os.environ.get("PYTEST_CURRENT_TEST", "")))
        on_host = {name: inner(value) for name, value in given.items()}
        on_host.update({name: True for name in _FOR_THE_INTERPRETER if name in on_host})
        if _in_name_only:
            if RECORD.capturing is not None:
                RECORD.capturing.add(self.__name__, lambda: None)
            return None
        again = lambda: computed(self, grid=grid, warmup=warmup, **on_host)
        with no_dispatch():
            if RECORD.capturing is not None:
                RECORD.capturing.keep(*(x for x in on_host.values() if isinstance(x, torch.Tensor)))
                RECORD.capturing.add(self.__name__, again)
            again()
        return None

    interpreter.InterpretedFunction.run = run


@contextmanager
def in_name_only() -> Iterator[None]:
    """Inside the block launches are noted and not computed."""
    _in_name_only.append(True)
    try:
        yield
    finally:
        _in_name_only.pop()


def _check(kernel: str, given: dict[str, Any], grid: tuple[int, ...]) -> None:
    limits = (2**31 - 1, 65_535, 65_535)
    if any(not 1 <= n <= limit for n, limit in zip(grid, limits)):
        raise CudaError(f"{kernel} launched with the grid {grid} at {where()}")
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and not isinstance(x, Masked):
            raise CudaError(f"{kernel}: {name} is a {x.device} tensor at {where()}")


def _launch(kernel, given: dict[str, Any], options: dict[str, Any]) -> Launch:
    constants, kinds = {}, {}
    annotations = inspect.get_annotations(kernel.fn)
    for name in kernel.arg_names:
        value = given[name]
        if "constexpr" in str(annotations.get(name)) or value is None:
            constants[name] = False if name in _FOR_THE_INTERPRETER else value
        elif isinstance(value, torch.Tensor):
            aligned = inner(value).data_ptr() % 16 == 0
            kinds[name] = f"*{_TYPES[value.dtype]}{':16' if aligned else ''}"
        elif isinstance(value, float):
            kinds[name] = "fp32"
        elif isinstance(value, bool):
            kinds[name] = "i1"
        else:
            kinds[name] = "i32" if abs(value) < 2**31 else "i64"
    return Launch(
        kernel.fn.__module__, kernel.__name__, tuple(kinds.items()), tuple(constants.items()),
        options.get("num_warps", 4), options.get("num_stages"),
    )  # fmt: skip


def write(path: str | Path) -> None:
    """All launches so far, one JSON object a line."""
    with open(path, "a", encoding="utf-8") as file:
        for launch, (place, test) in LAUNCHES.items():
            file.write(json.dumps({**asdict(launch), "where": place, "test": test}) + "\n")


def _round_bfloat16() -> None:
    """Triton's interpreter cuts float32 off where a card rounds to bfloat16, and multiplies bfloat16's bits as
    integers: kernels that are right would look wrong."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data, source, target, mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(data), bits >> 16 | 0x40, nearest).astype(np.uint16)

    def product(self, a, b, d, *more):
        wide = lambda x: (
            interpreter.TensorHandle(rounded(x.data, tl.bfloat16, tl.float32, None), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
        )
        return dot(self, wide(a), wide(b), d, *more)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = product
