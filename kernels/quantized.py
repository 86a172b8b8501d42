"""Weights of a language-model head in 8 or 4 bits, read one tile (or a handful of rows) at a time.

    int8:  W[v, h] = code[v, h] * scale[v, h // 64],  scale = max|W| / 127 over 64 weights of one row
    NF4:   bitsandbytes' blocks of 64 (QLoRA, arXiv:2305.14314), with or without double quantization of the scales

Memory: 1.03 (int8, float16 scales) or 0.52 (NF4, double quantization) bytes a weight, plus whatever tile the caller
asks for. On GSM8K answers of Qwen2.5-Coder-0.5B the int8 head is 1.7e-5 nats from the float32 one, plain bfloat16
logits are 9.7e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from lowvram_grpo.kernels.cuts import cuts
from lowvram_grpo.kernels.int8_tile import BLOCK, covers, int8_tile
from torch import Tensor

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

STATISTICS_BLOCK = 256  # bitsandbytes' own choice
_BLOCK_ELEMENTS = 2**22  # of a dense weight, while it is being quantized: 16 MiB in float32


def row_blocks(v: int, h: int, device: torch.device) -> Iterator[slice]:
    """Slices that cut V rows of H weights into blocks of about 4 million weights."""
    return (slice(*block) for block in cuts(v, max(1, _BLOCK_ELEMENTS // h), device))


def quantize_statistics(absmax: Tensor) -> tuple[Tensor, Tensor, QuantState]:
    """The scales of 4-bit blocks, quantized themselves (QLoRA's double quantization): uint8, their offset (0-d), and
    the statistics of the second quantization.

    bitsandbytes' quantize_4bit(compress_statistics=True) does this too, but with a table that it keeps on the first
    device it meets, even if that is meta: all that is quantized after it fails.
    """
    from bitsandbytes.functional import quantize_blockwise

    offset = absmax.mean()
    small, state = quantize_blockwise(absmax - offset, code=_dynamic_map(), blocksize=STATISTICS_BLOCK)
    return small, offset, state


@lru_cache(maxsize=1)
def _dynamic_map() -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map()


@dataclass(frozen=True)
class Int8Weight:
    """codes (V, H) int8; scales (V, ceil(H / 64)) float16 or float32."""

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @classmethod
    def quantize(cls, weight: Tensor, device: torch.device | None = None) -> Int8Weight:
        """Round a dense (V, H) weight to the nearest code, row block by row block; the codes lie on `device`, the
        weight's own if left out, which never holds more than a block of the dense weight."""
        v, h = weight.shape
        device = device or weight.device
        blocks = -(-h // BLOCK)
        codes = torch.empty(v, h, dtype=torch.int8, device=device)
        scales = torch.empty(v, blocks, dtype=torch.float16, device=device)
        for rows in row_blocks(v, h, torch.device(device)):
            w = torch.nn.functional.pad(weight[rows].detach().to(device).float(), (0, blocks * BLOCK - h))
            w = w.unflatten(1, (-1, BLOCK))
            # Rounded against the scale as it is stored, or float16's rounding would be an error of its own.
            scale = (w.abs().amax(2) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
            scales[rows] = scale
            codes[rows] = (w / scale.float()[..., None]).round_().clamp_(-127, 127).flatten(1)[:, :h].char()
        return cls(codes, scales)

    def read(self, codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        """Dequantize (n, H) codes with (n, blocks) scales into `out` (n, H)."""
        h = codes.shape[1]
        # The product is made in float16 or better and rounded once; bfloat16 scales would all be off by up to 2^-9.
        scales = scales.float() if out.dtype == torch.float32 else scales
        if covers(codes, scales, out):
            return int8_tile(codes, scales, out)
        if h % BLOCK == 0:
            blocks = out.unflatten(1, (-1, BLOCK))
            torch.mul(codes.unflatten(1, (-1, BLOCK)), scales[..., None], out=blocks)
        else:
            torch.mul(codes, scales.repeat_interleave(BLOCK, 1)[:, :h], out=out)
        return out

    def tile(self, v0: int, v1: int, out: Tensor) -> Tensor:
        return self.read(self.codes[v0:v1].to(out.device), self.scales[v0:v1].to(out.device), out)

    def rows(self, ids: Tensor, out: Tensor) -> Tensor:
        ids = ids.to(self.device)
        return self.read(self.codes[ids].to(out.device), self.scales[ids].to(out.device), out)

    def flatten(self) -> tuple[list[Tensor], list[float]]:
        return [self.codes, self.scales], []


@dataclass(frozen=True)
class NF4Weight:
    """A bitsandbytes 4-bit weight of shape (V, H), H a multiple of 64.

    Attributes:
        packed: (V, H / 2) uint8, two codes a byte.
        absmax: (V, H / 64) float32, or uint8 with double quantization.
        code: (16,) float32.
        nested: with double quantization, its (ceil(V * H / 64 / 256),) float32 scales and (256,) float32 code.
        offset: of the doubly quantized scales.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested: tuple[Tensor, Tensor] | None = None
    offset: float = 0.0
    nested_block: int = 256

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.packed.shape[1] * 2

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @classmethod
    def quantize(cls, weight: Tensor, double: bool = True, device: torch.device | None = None) -> NF4Weight:
        """By bitsandbytes, row block by row block, onto `device` (the weight's own if left out).

        Raises:
            ValueError: the hidden size is not a multiple of 64, so blocks would run across rows.
        """
        from bitsandbytes.functional import get_4bit_type, quantize_4bit

        v, h = weight.shape
        if h % BLOCK:
            raise ValueError(f"an NF4 head needs a hidden size that is a multiple of {BLOCK}, not {h}")
        device = device or weight.device
        packed = torch.empty(v, h // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(v, h // BLOCK, device=device)
        for rows in row_blocks(v, h, torch.device(device)):
            part, state = quantize_4bit(
                weight[rows].detach().to(device).contiguous(), blocksize=BLOCK, quant_type="nf4"
            )
            packed[rows], absmax[rows] = part.view(-1, h // 2), state.absmax.view(-1, h // BLOCK)
        code = get_4bit_type("nf4", device=device)
        if not double:
            return cls(packed, absmax, code)
        small, offset, inner = quantize_statistics(absmax.flatten())
        offset = 0.0 if offset.is_meta else float(offset)
        return cls(packed, small.view(absmax.shape), code, (inner.absmax, inner.code), offset, inner.blocksize)

    @classmethod
    def of(cls, packed: Tensor, state, shape: tuple[int, int]) -> NF4Weight:
        """From bitsandbytes' own packed tensor and QuantState.

        Raises:
            ValueError: not NF4 in blocks of 64.
        """
        if state.quant_type != "nf4" or state.blocksize != BLOCK or shape[1] % BLOCK:
            raise ValueError(
                f"a 4-bit head must be NF4 in blocks of {BLOCK} with a hidden size that is a multiple of {BLOCK}; this "
                f"one is {state.quant_type} in blocks of {state.blocksize} of shape {shape}"
            )
        v, h = shape
        absmax = state.absmax.view(v, h // BLOCK)
        if not state.nested:
            return cls(packed.view(v, h // 2), absmax, state.code)
        inner = state.state2
        return cls(
            packed.view(v, h // 2), absmax, state.code, (inner.absmax, inner.code), float(state.offset), inner.blocksize
        )

    def scales(self, ids: Tensor) -> Tensor:
        """float32 (n, H / 64) scales of rows `ids` (n,)."""
        absmax = self.absmax[ids]
        if self.nested is None:
            return absmax
        blocks = self.absmax.shape[1]
        place = (ids[:, None] * blocks + torch.arange(blocks, device=ids.device)) // self.nested_block
        return self.nested[1][absmax.int()] * self.nested[0][place] + self.offset

    def _read(self, packed: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        if not out.numel():  # bitsandbytes would end the process
            return out
        state = QuantState(
            absmax=scales.to(out.device).flatten(),
            shape=out.shape,
            code=self.code.to(out.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=out.dtype,
        )
        column = packed.to(out.device).reshape(-1, 1)
        if out.is_cuda and out.is_contiguous():
            return dequantize_4bit(column, state, out=out)
        return out.copy_(dequantize_4bit(column, state).view(out.shape))  # its CPU operator has no `out`

    def tile(self, v0: int, v1: int, out: Tensor) -> Tensor:
        return self._read(self.packed[v0:v1], self.scales(torch.arange(v0, v1, device=self.device)), out)

    def rows(self, ids: Tensor, out: Tensor) -> Tensor:
        ids = ids.to(self.device)
        return self._read(self.packed[ids], self.scales(ids), out)

    def flatten(self) -> tuple[list[Tensor], list[float]]:
        return [self.packed, self.absmax, self.code, *(self.nested or ())], [self.offset, self.nested_block]
