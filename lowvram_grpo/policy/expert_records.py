"""How the weights of one expert lie in one piece of memory, in bitsandbytes' NF4.

A record holds all that an expert multiplies by, one matrix after another, so that bringing an expert to the card is one
copy. A matrix is quantized by itself, as bitsandbytes quantizes a linear layer: NF4 in blocks of 64 with doubly
quantized scales (QLoRA, arXiv:2305.14314). gate and up that lie one above the other are two matrices, as they are in
checkpoints: what such a checkpoint has in 4 bits is taken bit by bit, and what is made here is what others make.

    matrix:  packed (n/2 bytes) | scales (n/64, uint8) | their scales (n/64/256, float32) | their offset (float32)

Memory: 0.516 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowvram_grpo.kernels.layer import nf4_dense
from lowvram_grpo.kernels.quantized import BLOCK, STATISTICS_BLOCK, quantize_statistics
from lowvram_grpo.kernels.runtime import HAS_TRITON

_ALIGN = 16  # bytes, from which kernels read several numbers at once
UP, DOWN = 0, 1


@dataclass(frozen=True)
class Matrix:
    """One quantized matrix of an expert, and where in the record it lies.

    Attributes:
        shape: as it is stored, (out, in) or transposed.
        begin: byte of the record.
    """

    shape: tuple[int, int]
    begin: int

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        blocks = -(-self.numel // BLOCK)
        return -(-self.numel // 2), blocks, 4 * -(-blocks // STATISTICS_BLOCK), 4

    @property
    def bytes(self) -> int:
        return sum(-(-size // _ALIGN) * _ALIGN for size in self._sizes)

    def parts(self, record: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of a record (uint8): packed, scales (uint8), their scales (float32), their offset (float32, 0-d)."""
        at, found = self.begin, []
        for size in self._sizes:
            found.append(record[at : at + size])
            at += -(-size // _ALIGN) * _ALIGN
        packed, scales, coarse, offset = found
        return packed, scales, coarse.view(torch.float32), offset.view(torch.float32)[0]


@dataclass(frozen=True)
class Layout:
    """What a record of an experts module holds.

    Attributes:
        matrices: those of the product into the expert (one, or gate and up), and that out of it.
        transposed: they are stored (in, out).
    """

    matrices: tuple[tuple[Matrix, ...], tuple[Matrix, ...]]
    transposed: bool

    @classmethod
    def of(cls, up: Sequence[tuple[int, int]], down: tuple[int, int], transposed: bool) -> Layout:
        """From the shapes of the matrices that are quantized one by one."""
        at, made = 0, []
        for shape in (*up, down):
            made.append(Matrix(tuple(shape), at))
            at += made[-1].bytes
        return cls((tuple(made[:-1]), (made[-1],)), transposed)

    @property
    def bytes(self) -> int:
        """Of a record."""
        last = self.matrices[DOWN][-1]
        return last.begin + last.bytes

    @property
    def weights(self) -> int:
        """Numbers in an expert."""
        return sum(m.numel for product in self.matrices for m in product)

    @property
    def largest(self) -> int:
        """Numbers in the largest matrix, of which one is in 16 bits at a time while experts are quantized."""
        return max(m.numel for product in self.matrices for m in product)

    def shape(self, product: int) -> tuple[int, int]:
        """Of the weight of a product (UP or DOWN), its matrices one above the other."""
        matrices = self.matrices[product]
        return sum(m.shape[0] for m in matrices), matrices[0].shape[1]

    def dense(self, record: Tensor, workspace: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the two products in the dtype of `workspace`, which has room for an expert (`weights`)."""
        made, at = [], 0
        for product in (UP, DOWN):
            rows, columns = self.shape(product)
            made.append(workspace[at : at + rows * columns].view(rows, columns))
            at, top = at + rows * columns, 0
            for matrix in self.matrices[product]:
                dequantize(*matrix.parts(record), made[-1][top : top + matrix.shape[0]])
                top += matrix.shape[0]
        return made[UP], made[DOWN]


def quantize(weight: Tensor, packed: Tensor, scales: Tensor, coarse: Tensor, offset: Tensor) -> None:
    """Write a dense matrix into the parts of a record, in NF4 with double quantization; the bits are bitsandbytes'."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    small, mean, inner = quantize_statistics(state.absmax)
    for part, made in ((packed, codes), (scales, small), (coarse, inner.absmax), (offset, mean)):
        part.copy_(made.view(part.shape))


def dequantize(packed: Tensor, scales: Tensor, coarse: Tensor, offset: Tensor, out: Tensor) -> Tensor:
    """The matrix in `out`, contiguous and in float32 or 16 bits: bitsandbytes' bits, in one launch on a GPU."""
    if out.is_meta:
        return out
    state = _state(packed, scales, coarse, offset, out)
    if out.is_cuda and HAS_TRITON and nf4_dense.fits(packed, state):
        return nf4_dense.dense_nf4(packed, state, out.dtype, out=out)
    from bitsandbytes.functional import dequantize_4bit

    if out.is_cuda:
        return dequantize_4bit(packed.view(-1, 1), state, out=out)
    return out.copy_(dequantize_4bit(packed.view(-1, 1), state).view(out.shape))


def _state(packed: Tensor, scales: Tensor, coarse: Tensor, offset: Tensor, out: Tensor):
    from bitsandbytes.functional import QuantState

    code, code2 = _tables(str(packed.device))
    inner = QuantState(absmax=coarse, code=code2, blocksize=STATISTICS_BLOCK, dtype=torch.float32)
    return QuantState(
        absmax=scales, shape=out.shape, code=code, blocksize=BLOCK, quant_type="nf4", dtype=out.dtype, offset=offset,
        state2=inner,
    )  # fmt: skip


@lru_cache(maxsize=8)
def _tables(device: str) -> tuple[Tensor, Tensor]:
    """The 16 values of NF4, and the 256 of its scales."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    return get_4bit_type("nf4", device=device), create_dynamic_map().to(device)


def write(layout: Layout, record: Tensor, product: int, weight: Any, stage: Callable[[Tensor], Tensor]) -> None:
    """Quantize the weight of a product (as the model has it, one above the other) into a record.

    Args:
        weight: on any device; or a list of its matrices, stored in 4 bits (`stored_weights.StoredNF4`), or not.
        stage: brings a matrix to a device, in the dtype in which it is quantized.
    """
    matrices = layout.matrices[product]
    parts = weight.split([m.shape[0] for m in matrices]) if isinstance(weight, Tensor) else weight
    for matrix, part in zip(matrices, parts, strict=True):
        into, stored = matrix.parts(record), None if isinstance(part, Tensor) else part.parts()
        if stored is None:
            quantize(stage(part if isinstance(part, Tensor) else part.dense()), *into)
            continue
        for place, made in zip(into, stored):
            place.copy_(made.view(place.shape))
