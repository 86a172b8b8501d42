"""The products of a few hidden states with sibling linear layers (q, k, v; gate, up), adapters and biases included, in
one launch, by weights in 16 bits or in bitsandbytes' 4.

    out_i[n] = round16(W_i x[n] + b_i) + U_i^T z_i[n]        z = x A^T of all siblings side by side, made before

A decode step is bound by launches and by the bytes of its weights. bitsandbytes launches once a layer, and from some 5
to 32 rows on, by card and shape, writes 16-bit weights and reads them again: 0.5 + 2 + 2 bytes a weight, and a tensor
of the size of the layer. Here weights are read once and written nowhere, whatever the number of rows, and the adapter's
product, the bias and the sum need no launches of their own.

A 4-bit weight is dequantized as bitsandbytes does it for a training pass, level[code] * scale in float32 rounded to the
16 bits of x, where scale = nested_level[code'] * nested_scale + offset under double quantization (QLoRA,
arXiv:2305.14314). So what is sampled and what is scored differ by the order of float32 sums. The product with a layer's
own weight is rounded to 16 bits before the adapter's is added in float32, as the base layer of an adapter returns it.

Memory: the outputs. No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from lowvram_grpo.kernels.card import card
from lowvram_grpo.kernels.decode.small_product_kernel import (
    MOST_ROWS,
    MOST_SIBLINGS,
    WIDEST_RANK,
    ProductTiles,
    rank_constant,
    small_product_kernel,
    tiles_of,
)
from lowvram_grpo.kernels.quantized import BLOCK
from lowvram_grpo.kernels.runtime import HAS_TRITON, device_guard, interpreted, require_triton
from torch import Tensor

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

DEVICES = ("cuda", "meta")
_DTYPES = (torch.float16, torch.bfloat16)


class FourBit(NamedTuple):
    """A bitsandbytes 4-bit weight of shape (O, I), I a multiple of 64, in blocks of 64.

    Attributes:
        packed: uint8, two codes a byte, the earlier one in the upper half.
        code: (16,) float32 levels.
        absmax: (O * I / 64,) float32, or uint8 with double quantization, whose float32 scales, levels (256,) and offset
            (a tensor of one number) are `nested`, `nested_code` and `offset`.
    """

    packed: Tensor
    shape: tuple[int, int]
    code: Tensor
    absmax: Tensor
    nested: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    nested_block: int = 256

    @classmethod
    def of(cls, packed: Tensor, state: QuantState) -> FourBit | None:
        """From bitsandbytes' own tensors; None where blocks are not of 64 weights of one row. Waits for nothing."""
        shape = tuple(state.shape)
        if state.blocksize != BLOCK or len(shape) != 2 or shape[1] % BLOCK or packed.dtype != torch.uint8:
            return None
        found = cls(packed.view(-1), shape, state.code, state.absmax)
        if not state.nested:
            return found if state.absmax.dtype == torch.float32 else None
        inner = state.state2
        if not isinstance(state.offset, Tensor) or inner.blocksize < 1:
            return None
        return found._replace(
            nested=inner.absmax, nested_code=inner.code, offset=state.offset.float(), nested_block=inner.blocksize
        )

    def dense(self) -> Tensor:
        """float32 (O, I)."""
        scales = self.absmax
        if self.nested is not None:
            place = torch.arange(scales.numel(), device=scales.device) // self.nested_block
            scales = self.nested_code[scales.flatten().int()] * self.nested[place] + self.offset
        codes = torch.stack([self.packed >> 4, self.packed & 15], -1).view(-1, BLOCK)
        return (self.code[codes.int()] * scales.view(-1, 1)).view(self.shape)


class Sibling(NamedTuple):
    """One layer: its weight (O, I), its bias (O,) in the dtype of x, and the scaled B^T (r, O) of its adapter, both
    contiguous."""

    weight: Tensor | FourBit
    bias: Tensor | None = None
    up: Tensor | None = None


def covers(x: Tensor, siblings: Sequence[Sibling], z: Tensor | None = None) -> bool:
    """Whether `small_product` takes these: a few rows in 16 bits on CUDA (or meta) beside weights of one kind."""
    if not (HAS_TRITON and x.device.type in DEVICES and x.dtype in _DTYPES and x.ndim == 2):
        return False
    known = x.dtype == torch.float16 or card(x.device)[0] >= 80  # Turing has no bfloat16
    return (
        known and 0 < len(x) <= MOST_ROWS and fits(x.dtype, x.shape[1], siblings) and (z is None or z.dtype == x.dtype)
    )


def fits(dtype: torch.dtype, width: int, siblings: Sequence[Sibling]) -> bool:
    """Whether the layers can be one product of rows (N, width) of `dtype`, whatever they lie on."""
    if not (dtype in _DTYPES and 0 < len(siblings) <= MOST_SIBLINGS):
        return False
    kinds = {_kind(s) for s in siblings}
    if len(kinds) != 1 or len({_place(s) for s in siblings}) != 1:
        return False
    return all(_is_plain(s, dtype, width) for s in siblings)


def _kind(s: Sibling) -> tuple:
    nested = (s.weight.nested is not None, s.weight.nested_block) if isinstance(s.weight, FourBit) else None
    return isinstance(s.weight, FourBit), nested, s.bias is None, s.up is None


def _place(s: Sibling) -> torch.device:
    return (s.weight.packed if isinstance(s.weight, FourBit) else s.weight).device


def _is_plain(s: Sibling, dtype: torch.dtype, width: int) -> bool:
    beside = [x for x in (s.bias, s.up) if x is not None]
    if not all(x.dtype == dtype and x.is_contiguous() for x in beside) or s.weight.shape[1] != width:
        return False
    if isinstance(s.weight, FourBit):
        fine = all(x is None or x.is_contiguous() for x in s.weight if x is None or isinstance(x, Tensor))
    else:
        fine = s.weight.dtype == dtype and s.weight.is_contiguous()
    return fine and (s.up is None or len(s.up) <= WIDEST_RANK)


def small_product(
    x: Tensor, siblings: Sequence[Sibling], z: Tensor | None = None, tiles: ProductTiles | None = None
) -> list[Tensor]:
    """(N, O_i) of the dtype of x for each sibling, for rows x (N, I) of float16 or bfloat16.

    Views of one tensor, each contiguous. On meta tensors only that. Any N, but every 64 rows (32 on Turing) read the
    weights once more.

    Args:
        z: (N, sum of ranks), x times the siblings' stacked A^T, in the dtype of x; None without adapters.
        tiles: those of `tiles_of` where None; a trial takes each.

    Raises:
        ValueError: siblings that `fits` refuses.
        RuntimeError: no Triton, or no GPU and no interpreter.
    """
    if not fits(x.dtype, x.shape[1], siblings):
        raise ValueError("small_product needs 16-bit rows and sibling layers that are alike; see `fits`")
    n, sizes = len(x), [s.weight.shape[0] for s in siblings]
    out = torch.empty(n * sum(sizes), dtype=x.dtype, device=x.device)
    if n and not out.is_meta:
        require_triton("small_product", x, "the layers themselves")
        _launch(x, siblings, z, sizes, out, tiles or tiles_of(card(x.device)[0], n, sum(sizes), card(x.device)[1]))
    return [part.view(n, size) for part, size in zip(out.split([n * size for size in sizes]), sizes)]


def small_product_ref(x: Tensor, siblings: Sequence[Sibling], z: Tensor | None = None) -> list[Tensor]:
    """The same by PyTorch's operators, with each weight in float32."""
    outs, first = [], 0
    for s in siblings:
        w = s.weight.dense().to(x.dtype) if isinstance(s.weight, FourBit) else s.weight
        out = x.float() @ w.float().T + (0.0 if s.bias is None else s.bias.float())
        if s.up is not None:
            part = z[:, first : first + len(s.up)]
            out = out.to(x.dtype).float() + part.float() @ s.up.float()
            first += len(s.up)
        outs.append(out.to(x.dtype))
    return outs


def _launch(
    x: Tensor, siblings: Sequence[Sibling], z: Tensor | None, sizes: list[int], out: Tensor, tiles: ProductTiles
) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    if z is not None and z.stride(1) != 1:
        z = z.contiguous()
    ranks = [0 if s.up is None else len(s.up) for s in siblings]
    missing = MOST_SIBLINGS - len(siblings)
    # Absent siblings have no outputs; their pointers are never looked at.
    three = [*siblings, *siblings[:1] * missing]
    weights = [s.weight for s in three]
    if isinstance(weights[0], FourBit):
        nested_block = weights[0].nested_block
        tensors = list(zip(*((w.packed, w.code, w.absmax, w.nested, w.nested_code, w.offset) for w in weights)))
    else:
        nested_block = 1
        tensors = [weights, *[(None,) * MOST_SIBLINGS] * 5]
    pointers = [p for kind in (*tensors, [s.bias for s in three], [s.up for s in three]) for p in kind]
    count = sum(-(-size // tiles.outputs) for size in sizes)
    with device_guard(x):
        small_product_kernel[(count, -(-len(x) // tiles.rows))](
            x, z, out, *pointers, len(x), x.stride(0), 0 if z is None else z.stride(0), *sizes, *[0] * missing,
            *ranks, *[0] * missing, WIDTH=x.shape[1], RANK=rank_constant(max(ranks)), NESTED_BLOCK=nested_block,
            INTERPRET=interpreted(), **tiles.constants(),
        )  # fmt: skip
