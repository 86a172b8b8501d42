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
from lowvram_grpo.kernels.decode.launch import card, power_of_2
from lowvram_grpo.kernels.quantized import BLOCK
from lowvram_grpo.kernels.runtime import (
    HAS_TRITON,
    CompileCase,
    compile_case,
    device_guard,
    interpreted,
    jit,
    require_triton,
    tl,
)
from torch import Tensor

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

MOST_ROWS = 64  # that share one reading of the weights
MOST_SIBLINGS = 3
WIDEST_RANK = 256  # of an adapter: more of it would outweigh the layer
_RANKS = 32  # of an adapter, that a program takes at a time
DEVICES = ("cuda", "meta")
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_PACKED = BLOCK // 2  # bytes of a block of codes


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


class ProductTiles(NamedTuple):
    """Outputs and rows of a program, and how many blocks of 64 weights it takes at a time."""

    outputs: int
    rows: int
    blocks: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """As the kernel's launch takes them."""
        return {
            "TILE": self.outputs, "ROWS": self.rows, "BLOCKS": self.blocks, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


def tiles_of(cc: int, rows: int, outputs: int, multiprocessors: int) -> ProductTiles:
    """Tiles for compute capability `cc` and so many rows and outputs of all siblings: estimates, until a card has been
    asked. Few outputs are cut into small tiles, so that each multiprocessor has some to read."""
    n = min(MOST_ROWS, power_of_2(max(16, rows)))
    if cc < 80:  # no tensor cores in Triton
        return ProductTiles(32, min(32, n), 1, 4 if n == 16 else 8, 1)
    few = outputs < 64 * multiprocessors
    if n == 16:
        return ProductTiles(16 if few else 32, 16, 4, 4, 3)
    return ProductTiles(32 if few else 64, n, 2, 4 if few else 8, 3)


def all_tiles(cc: int) -> list[ProductTiles]:
    """Everything that `tiles_of` can choose."""
    return list(dict.fromkeys(tiles_of(cc, rows, outputs, 1) for rows in (16, 32, 64) for outputs in (1, 64)))


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
    four_bit = isinstance(weights[0], FourBit)
    if four_bit:
        tensors = list(zip(*((w.packed, w.code, w.absmax, w.nested, w.nested_code, w.offset) for w in weights)))
    else:
        tensors = [weights, *[(None,) * MOST_SIBLINGS] * 5]
    pointers = [p for kind in (*tensors, [s.bias for s in three], [s.up for s in three]) for p in kind]
    count = sum(-(-size // tiles.outputs) for size in sizes)
    with device_guard(x):
        _small_product_kernel[(count, -(-len(x) // tiles.rows))](
            x, z, out, *pointers, len(x), x.stride(0), 0 if z is None else z.stride(0), *sizes, *[0] * missing,
            *ranks, *[0] * missing, WIDTH=x.shape[1], **_rank_constants(max(ranks)), FOUR_BIT=four_bit, BLOCK=BLOCK,
            NESTED_BLOCK=weights[0].nested_block if four_bit else 1, INTERPRET=interpreted(), **tiles.constants(),
        )  # fmt: skip


def _rank_constants(rank: int) -> dict[str, int]:
    wide = power_of_2(max(16, rank))
    return {"RANK": wide, "RANKS": min(_RANKS, wide)}


@jit
def _pick(a, b, c, second, third):
    return tl.where(third, c, tl.where(second, b, a))


@jit
def _small_product_kernel(
    x_ptr, z_ptr, out_ptr, w_a, w_b, w_c, code_a, code_b, code_c, absmax_a, absmax_b, absmax_c,
    nested_a, nested_b, nested_c, nested_code_a, nested_code_b, nested_code_c, offset_a, offset_b, offset_c,
    bias_a, bias_b, bias_c, up_a, up_b, up_c, n, x_stride, z_stride, size_a, size_b, size_c, rank_a, rank_b, rank_c,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, FOUR_BIT: tl.constexpr, BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, INTERPRET: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: TILE outputs of one sibling for ROWS rows."""
    tile = tl.program_id(0)
    first_b = tl.cdiv(size_a, TILE)
    first_c = first_b + tl.cdiv(size_b, TILE)
    second, third = tile >= first_b, tile >= first_c
    tile -= _pick(0, first_b, first_c, second, third)
    size = _pick(size_a, size_b, size_c, second, third)
    before = _pick(0, size_a, size_a + size_b, second, third)
    w_ptr = _pick(w_a, w_b, w_c, second, third)
    kind = x_ptr.dtype.element_ty
    o = tile * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside, alive = o < size, row < n
    far = o.to(tl.int64)
    x_ptr += row.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros([TILE, ROWS], tl.float32)
    if FOUR_BIT:
        code_ptr = _pick(code_a, code_b, code_c, second, third)
        absmax_ptr = _pick(absmax_a, absmax_b, absmax_c, second, third)
        if nested_a is not None:
            nested_ptr = _pick(nested_a, nested_b, nested_c, second, third)
            nested_code_ptr = _pick(nested_code_a, nested_code_b, nested_code_c, second, third)
            offset = tl.load(_pick(offset_a, offset_b, offset_c, second, third))
        levels = tl.load(code_ptr + tl.arange(0, 16))
        ROW_BLOCKS: tl.constexpr = WIDTH // BLOCK
        HALF: tl.constexpr = BLOCKS * BLOCK // 2
        b = tl.arange(0, BLOCKS)
        j = tl.arange(0, BLOCK // 2)
        h = tl.arange(0, 2 * HALF)
        codes_ptr = w_ptr + far[:, None, None] * (WIDTH // 2) + (b * (BLOCK // 2))[None, :, None] + j[None, None, :]
        for first in range(0, ROW_BLOCKS, BLOCKS):
            there = first + b < ROW_BLOCKS
            some = inside[:, None] & there[None, :]
            codes = tl.load(codes_ptr + first * (BLOCK // 2), mask=some[:, :, None], other=0).to(tl.int32)
            at = far[:, None] * ROW_BLOCKS + (first + b)[None, :]
            if nested_a is not None:
                small = tl.load(absmax_ptr + at, mask=some, other=0).to(tl.int32)
                scale = tl.load(nested_code_ptr + small) * tl.load(
                    nested_ptr + at // NESTED_BLOCK, mask=some, other=0.0
                )
                scale += offset
            else:
                scale = tl.load(absmax_ptr + at, mask=some, other=0.0)
            scale = tl.broadcast_to(scale[:, :, None], [TILE, BLOCKS, BLOCK // 2])
            scale = tl.reshape(scale, [TILE, HALF])
            codes = tl.reshape(codes, [TILE * HALF])
            upper = tl.reshape(tl.gather(levels, codes >> 4, 0), [TILE, HALF])
            lower = tl.reshape(tl.gather(levels, codes & 15, 0), [TILE, HALF])
            k = first * BLOCK + h
            x = tl.load(x_ptr + k[None, :], mask=alive[:, None] & (k < WIDTH)[None, :], other=0.0)
            x_even, x_odd = tl.split(tl.reshape(x, [ROWS, HALF, 2]))
            x_even, x_odd = tl.trans(x_even), tl.trans(x_odd)
            upper = (upper * scale).to(kind)
            lower = (lower * scale).to(kind)
            if INTERPRET:  # numpy has no bfloat16
                upper, lower = upper.to(tl.float32), lower.to(tl.float32)
                x_even, x_odd = x_even.to(tl.float32), x_odd.to(tl.float32)
            acc = tl.dot(upper, x_even, acc, input_precision="ieee")
            acc = tl.dot(lower, x_odd, acc, input_precision="ieee")
    else:
        STEP: tl.constexpr = BLOCKS * BLOCK
        h = tl.arange(0, STEP)
        dense_ptr = w_ptr + far[:, None] * WIDTH + h[None, :]
        for first in range(0, WIDTH, STEP):
            there = first + h < WIDTH
            w = tl.load(dense_ptr + first, mask=inside[:, None] & there[None, :], other=0.0)
            x = tl.trans(tl.load(x_ptr + (first + h)[None, :], mask=alive[:, None] & there[None, :], other=0.0))
            if INTERPRET:
                w, x = w.to(tl.float32), x.to(tl.float32)
            acc = tl.dot(w, x, acc, input_precision="ieee")
    if bias_a is not None:
        bias = tl.load(_pick(bias_a, bias_b, bias_c, second, third) + o, mask=inside, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    if up_a is not None:
        acc = acc.to(kind).to(tl.float32)
        rank = _pick(rank_a, rank_b, rank_c, second, third)
        column = _pick(0, rank_a, rank_a + rank_b, second, third)
        up_ptr = _pick(up_a, up_b, up_c, second, third)
        z_ptr += row.to(tl.int64)[None, :] * z_stride + column
        for first in range(0, RANK, RANKS):
            r = first + tl.arange(0, RANKS)
            real = r < rank
            up = tl.load(up_ptr + r[None, :] * size + o[:, None], mask=real[None, :] & inside[:, None], other=0.0)
            z = tl.load(z_ptr + r[:, None], mask=alive[None, :] & real[:, None], other=0.0)
            if INTERPRET:
                up, z = up.to(tl.float32), z.to(tl.float32)
            acc = tl.dot(up, z, acc, input_precision="ieee")
    at = before.to(tl.int64) * n + row.to(tl.int64)[None, :] * size + o[:, None]
    tl.store(out_ptr + at, acc.to(kind), mask=inside[:, None] & alive[None, :])


def compile_cases(cc: int) -> list[CompileCase]:
    """What `small_product` launches on compute capability `cc`: every tile, 4-bit weights with double quantization and
    without, 16-bit ones, widths that steps fill and one that they do not, a single row."""
    kind = "fp16" if cc < 80 else "bf16"
    tiles = all_tiles(cc)
    cases = []
    for tile in tiles:
        cases.append(_case(tile, kind, 896, four_bit=True, nested=True, bias=True, rank=16))
        cases.append(_case(tile, kind, 896, four_bit=False, nested=False, bias=True, rank=16))
    tile = tiles[0]
    cases.append(_case(tile, "fp16", 960, four_bit=True, nested=False, bias=False, rank=0))
    cases.append(_case(tile, kind, 100, four_bit=False, nested=False, bias=False, rank=WIDEST_RANK))
    cases.append(_case(tile, kind, 4864, four_bit=True, nested=True, bias=False, rank=64, n=1))
    return cases


def _case(
    tiles: ProductTiles, kind: str, width: int, *, four_bit: bool, nested: bool, bias: bool, rank: int, **ones: int
) -> CompileCase:
    types: dict[str, str | None] = {
        "x_ptr": f"*{kind}:16",
        "z_ptr": f"*{kind}:16" if rank else None,
        "out_ptr": f"*{kind}:16",
    }
    each = {
        "w": "*u8:16" if four_bit else f"*{kind}:16", "code": "*fp32:16" if four_bit else None,
        "absmax": ("*u8:16" if nested else "*fp32:16") if four_bit else None, "nested": "*fp32:16" if nested else None,
        "nested_code": "*fp32:16" if nested else None, "offset": "*fp32:16" if nested else None,
        "bias": f"*{kind}:16" if bias else None, "up": f"*{kind}:16" if rank else None,
        "size": "i32:16", "rank": "i32:16",
    }  # fmt: skip
    types |= {f"{name}_{which}": type_ for name, type_ in each.items() for which in "abc"}
    types |= {"n": "i32", "x_stride": "i32" if width % 16 else "i32:16", "z_stride": "i32:16"}
    sizes = {k: v for k, v in tiles.constants().items() if k.isupper()} | ones
    sizes |= {
        "WIDTH": width, **_rank_constants(rank), "FOUR_BIT": four_bit, "BLOCK": BLOCK, "NESTED_BLOCK": 256,
        "INTERPRET": False,
    }  # fmt: skip
    name = (
        f"small_product {tuple(tiles)} I={width} {kind} 4-bit={four_bit} nested={nested} r={rank} {ones or ''}".rstrip()
    )
    return compile_case(name, _small_product_kernel, types, sizes, tiles.warps, tiles.stages)
