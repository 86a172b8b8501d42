"""Weights that a checkpoint of a mixture of experts holds in fewer bits already, read one matrix at a time.

* bitsandbytes' NF4, an expert after another, as of models stored in 4 bits before transformers 5 fused experts: a
  matrix's bytes go to where they belong as they are.
* MXFP4, in which gpt-oss is published (OCP Microscaling Formats v1.0): 32 weights along the inputs share a power of
  two, each is one of 16 numbers. transformers makes all of it bfloat16 where its kernels are missing; here an expert at
  a time is, and brought to NF4, which rounds once more.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from lowvram_grpo.kernels.quantized import BLOCK, STATISTICS_BLOCK

STATE = ".quant_state.bitsandbytes__nf4"
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127  # of the exponents


class Stored(Protocol):
    """A tensor in a file, read when it is called."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __call__(self) -> Tensor: ...


class Stacked(ABC):
    """A 3-D parameter (E, ...) that is read one expert at a time."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @abstractmethod
    def expert(self, index: int) -> Any:
        """(rows, columns) of one expert, on the CPU; or its matrices in 4 bits, where they are stored so."""

    def __iter__(self) -> Iterator[Any]:
        return (self.expert(i) for i in range(self.shape[0]))

    def __call__(self) -> Stacked:
        """Nothing is read yet."""
        return self


@dataclass(frozen=True)
class StoredNF4:
    """A matrix in bitsandbytes' NF4: its packed bytes, and by bitsandbytes' names what belongs to them."""

    packed: Stored
    beside: dict[str, Stored]

    @cached_property
    def _numbers(self) -> dict[str, Any]:
        return json.loads(bytes(self.beside[STATE[1:]]().tolist()))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._numbers["shape"])

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self._numbers["dtype"])

    def __call__(self) -> StoredNF4:
        """Nothing is read yet."""
        return self

    def statistics(self) -> dict[str, Tensor]:
        """What `Params4bit.from_prequantized` takes beside the packed bytes."""
        return {name: tensor() for name, tensor in self.beside.items()}

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Packed, scales, their scales, their offset, as in a record; None where it is quantized in another way."""
        found = self._numbers
        if found["blocksize"] != BLOCK or found.get("nested_blocksize") != STATISTICS_BLOCK:
            return None
        offset = torch.tensor(float(found["nested_offset"]))
        return self.packed(), self.beside["absmax"](), self.beside["nested_absmax"](), offset

    def dense(self) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState.from_dict(self.statistics(), torch.device("cpu"))
        return dequantize_4bit(self.packed(), state)


class MXFP4Experts(Stacked):
    """A 3-D parameter (E, in, out) that is stored as blocks (E, out, in / 32, 16), two numbers a byte, the first in the
    low bits, and their exponents (E, out, in / 32)."""

    def __init__(self, blocks: Stored, scales: Stored):
        self.blocks, self.scales = blocks, scales
        count, rows, groups, size = blocks.shape
        self.shape, self.dtype = (count, groups * size * 2, rows), torch.bfloat16

    def expert(self, index: int) -> Tensor:
        table = torch.tensor(_FP4, dtype=self.dtype)
        blocks, exponents = self.blocks()[index], self.scales()[index].to(torch.int32) - _BIAS
        numbers = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1)
        return torch.ldexp(numbers.flatten(2), exponents[..., None]).flatten(1).t().contiguous()
