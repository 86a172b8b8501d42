"""The kernel of `small_product.py`, and its tiles."""

from __future__ import annotations

from typing import NamedTuple

from lowvram_grpo.kernels.card import power_of_2
from lowvram_grpo.kernels.quantized import BLOCK
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, jit, tl

MOST_ROWS = 64  # that share one reading of the weights
MOST_SIBLINGS = 3
WIDEST_RANK = 256  # of an adapter: more of it would outweigh the layer
_constant = tl.constexpr if HAS_TRITON else int
_BLOCK = _constant(BLOCK)
_RANKS = _constant(32)  # of an adapter, that a program takes at a time


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


def rank_constant(rank: int) -> int:
    """What an adapter of `rank` is compiled for."""
    return power_of_2(max(16, rank))


@jit
def _pick(a, b, c, second, third):
    return tl.where(third, c, tl.where(second, b, a))


@jit
def small_product_kernel(
    x_ptr, z_ptr, out_ptr, w_a, w_b, w_c, code_a, code_b, code_c, absmax_a, absmax_b, absmax_c,
    nested_a, nested_b, nested_c, nested_code_a, nested_code_b, nested_code_c, offset_a, offset_b, offset_c,
    bias_a, bias_b, bias_c, up_a, up_b, up_c, n, x_stride, z_stride, size_a, size_b, size_c, rank_a, rank_b, rank_c,
    WIDTH: tl.constexpr, RANK: tl.constexpr, NESTED_BLOCK: tl.constexpr, INTERPRET: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: TILE outputs of one sibling for ROWS rows. Weights are 4-bit where they have a code."""
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
    if code_a is not None:
        code_ptr = _pick(code_a, code_b, code_c, second, third)
        absmax_ptr = _pick(absmax_a, absmax_b, absmax_c, second, third)
        if nested_a is not None:
            nested_ptr = _pick(nested_a, nested_b, nested_c, second, third)
            nested_code_ptr = _pick(nested_code_a, nested_code_b, nested_code_c, second, third)
            offset = tl.load(_pick(offset_a, offset_b, offset_c, second, third))
        levels = tl.load(code_ptr + tl.arange(0, 16))
        ROW_BLOCKS: tl.constexpr = WIDTH // _BLOCK
        HALF: tl.constexpr = BLOCKS * _BLOCK // 2
        b = tl.arange(0, BLOCKS)
        j = tl.arange(0, _BLOCK // 2)
        h = tl.arange(0, 2 * HALF)
        codes_ptr = w_ptr + far[:, None, None] * (WIDTH // 2) + (b * (_BLOCK // 2))[None, :, None] + j[None, None, :]
        for first in range(0, ROW_BLOCKS, BLOCKS):
            there = first + b < ROW_BLOCKS
            some = inside[:, None] & there[None, :]
            codes = tl.load(codes_ptr + first * (_BLOCK // 2), mask=some[:, :, None], other=0).to(tl.int32)
            at = far[:, None] * ROW_BLOCKS + (first + b)[None, :]
            if nested_a is not None:
                small = tl.load(absmax_ptr + at, mask=some, other=0).to(tl.int32)
                scale = tl.load(nested_code_ptr + small) * tl.load(
                    nested_ptr + at // NESTED_BLOCK, mask=some, other=0.0
                )
                scale += offset
            else:
                scale = tl.load(absmax_ptr + at, mask=some, other=0.0)
            scale = tl.broadcast_to(scale[:, :, None], [TILE, BLOCKS, _BLOCK // 2])
            scale = tl.reshape(scale, [TILE, HALF])
            codes = tl.reshape(codes, [TILE * HALF])
            upper = tl.reshape(tl.gather(levels, codes >> 4, 0), [TILE, HALF])
            lower = tl.reshape(tl.gather(levels, codes & 15, 0), [TILE, HALF])
            k = first * _BLOCK + h
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
        STEP: tl.constexpr = BLOCKS * _BLOCK
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
        RANKS: tl.constexpr = RANK if RANK < _RANKS else _RANKS
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
        "WIDTH": width, "RANK": rank_constant(rank), "NESTED_BLOCK": 256 if four_bit else 1, "INTERPRET": False,
    }  # fmt: skip
    name = (
        f"small_product {tuple(tiles)} I={width} {kind} 4-bit={four_bit} nested={nested} r={rank} {ones or ''}".rstrip()
    )
    return compile_case(name, small_product_kernel, types, sizes, tiles.warps, tiles.stages)
