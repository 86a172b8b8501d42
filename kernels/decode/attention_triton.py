"""`decode_attention` by Triton: three launches whose grids depend on nothing but shapes.

    prefix   (slot and block of its queries, KV head, split): the queries of a prompt's members, gathered through
             `members`, against one of `splits.prefix` ranges of the keys that any of them sees
    own      (row, KV head, split): a row's queries against one of `splits.own` ranges of its own cached tokens. Split 0
             writes the new token to the cache and attends to what it has of it in registers: nobody reads it back
    merge    (row, head): the ranges' outputs o_i, weighted by their log-sum-exps: sum_i e^(lse_i - lse) o_i. A sink is
             one more part, whose output is 0: no other launch knows of it

What changes from step to step (prefix, age, members, rank) is read from device tensors, so that a step can be captured
in a CUDA graph; nothing is read back. Each range is an even share of the keys that there are, not of the buffer's
length; a program whose range is empty writes a log-sum-exp of -inf and leaves. Sums are float32 under an online
softmax (arXiv:1805.02867) in powers of two; the ranges are flash-decoding's (pytorch.org/blog/flash-decoding).

Memory: (R, heads, splits.prefix + splits.own) outputs of D floats, and their log-sum-exps.
"""

from __future__ import annotations

from typing import Any

import torch
from lowvram_grpo.kernels.card import card, power_of_2
from lowvram_grpo.kernels.decode.attention_kernels import merge_kernel, own_kernel, prefix_kernel
from lowvram_grpo.kernels.decode.kv import KV, Rows
from lowvram_grpo.kernels.decode.launch import WIDEST_FLOAT32, Splits, Tiles, ranges, tiles_of
from lowvram_grpo.kernels.runtime import CompileCase, compile_case, device_guard, interpreted
from torch import Tensor

_MERGED = 8  # ranges that the merge holds at a time
_KINDS = {torch.float16: "*fp16:16", torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}


def decode_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: KV,
    own: KV,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in three launches; on meta tensors only what they allocate.

    Raises:
        ValueError: keys and values that do not lie alike in memory, each token's numbers together, or index tensors
            that are not contiguous.
    """
    if not all(x.is_contiguous() for x in (rows.age, rows.prefix, rows.members, rows.rank)):
        raise ValueError("age, prefix, members and rank must be contiguous; or take path='torch'")
    for cache in (prompts, own):
        lie = [cache.keys.stride() == cache.values.stride(), cache.keys.stride(3) == 1]
        if cache.quantized:
            lie += [cache.key_scales.stride() == cache.value_scales.stride(), cache.key_scales.stride(2) == 1]
        if not all(lie):
            raise ValueError("keys and values need equal strides and contiguous tokens; or take path='torch'")
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    r, heads, width = query.shape
    (slots, members), kv_heads, rep = rows.members.shape, key.shape[1], heads // key.shape[1]
    cc, processors = card(query.device)
    tiles, own_tiles = (tiles_of(cc, query.dtype, width, n) for n in (members * rep, rep))
    blocks = -(-members * rep // tiles.queries)
    splits = Splits(
        ranges(slots * blocks * kv_heads, prompts.keys.shape[2], tiles, processors),
        max(1, ranges(r * kv_heads, own.keys.shape[2], own_tiles, processors)),
    )
    parts = torch.empty(r, heads, sum(splits), width, dtype=torch.float32, device=query.device)
    lse = torch.empty(r, heads, sum(splits), dtype=torch.float32, device=query.device)
    out = torch.empty(r, heads, width, dtype=query.dtype, device=query.device)
    if query.is_meta or not r:
        return out
    wide = power_of_2(max(16, width))
    # What changes as rows end (splits, members) is no constant: it would compile anew.
    numbers = (window, scale, softcap)
    fixed = {"REP": rep, "WIDTH": width, "WIDE": wide, "INTERPRET": interpreted()}
    with device_guard(query):
        if splits.prefix:
            prefix_kernel[(slots * blocks, kv_heads, splits.prefix)](
                query, *prompts, rows.age, rows.prefix, rows.members, parts, lse, *query.stride()[:2],
                *_strides(prompts), sum(splits), members, *numbers, **tiles.constants(), **fixed,
            )  # fmt: skip
        own_kernel[(r, kv_heads, splits.own)](
            query, key, value, *own, rows.age, rows.rank, parts, lse, *query.stride()[:2], *key.stride()[:2],
            *value.stride()[:2], *_strides(own), sum(splits), *numbers, **own_tiles.constants(), **fixed,
        )  # fmt: skip
        merge_kernel[(r, heads)](
            parts, lse, rows.rank, sinks, out, splits.prefix, sum(splits), BLOCK=_MERGED, WIDTH=width,
            WIDE=wide, num_warps=2,
        )  # fmt: skip
    return out


def _strides(cache: KV) -> tuple[int, ...]:
    """Of a slot, head and token of keys and values, and of a slot and head of their scales."""
    return *cache.keys.stride()[:3], *(cache.key_scales.stride()[:2] if cache.quantized else (0, 0))


def compile_cases(cc: int) -> list[CompileCase]:
    """What `decode_attention_triton` launches on compute capability `cc`: every tile, for a head that fills it and one
    that does not, caches in 16 bits and int8, with window and soft cap and without."""
    half = torch.float16 if cc < 80 else torch.bfloat16
    # What may be asked for by name (fp16 = true), where bfloat16 is what is taken: the same tiles.
    cases = _cases(cc, torch.float16, 64, (64,), int8=False, masks=False) if cc >= 80 else []
    for width in (64, 80, 256, 512):
        cases += _cases(cc, half, width, (64,), int8=False, masks=False)
        cases += _cases(cc, half, width, (64, 32, 16), int8=True, masks=True)
        if width <= WIDEST_FLOAT32:
            cases += _cases(cc, torch.float32, width, (64,), int8=False, masks=True)
        for out in (half, torch.float16, torch.float32) if half != torch.float16 else (half, torch.float32):
            types = {
                "parts": "*fp32:16", "lse": "*fp32:16", "rank_ptr": "*i64:16", "out": _KINDS[out],
                "prefix_splits": "i32", "splits": "i32",
            }  # fmt: skip
            sizes = {"BLOCK": _MERGED, "WIDTH": width, "WIDE": power_of_2(width)}
            for name, sinks in (("", None), (" sinks", _KINDS[out])):
                given = {**types, "sinks": sinks}
                name = f"merge {_KINDS[out][1:5]} D={width}{name}"
                cases.append(compile_case(name, merge_kernel, given, sizes, 2, 1))
    return cases


def _cases(
    cc: int, dtype: torch.dtype, width: int, queries: tuple[int, ...], *, int8: bool, masks: bool
) -> list[CompileCase]:
    kind = _KINDS[dtype]
    cached = "*i8:16" if int8 else kind
    scales = "*fp32:16" if int8 else None
    wide = power_of_2(width)
    strides = ("query_row", "query_head", "key_row", "key_head", "value_row", "value_head", "slot_stride",
               "row_stride", "head_stride", "token_stride")  # fmt: skip
    types = {
        **dict.fromkeys(("query", "key", "value"), kind), **dict.fromkeys(("keys", "values"), cached),
        **dict.fromkeys(("key_scales", "value_scales"), scales), **dict.fromkeys(("out", "lse"), "*fp32:16"),
        **dict.fromkeys(("age_ptr", "prefix_ptr", "members_ptr", "rank_ptr"), "*i64:16"),
        **dict.fromkeys(strides, "i32:16"), **dict.fromkeys(("scale_slot", "scale_row", "scale_head"), "i32"),
        **dict.fromkeys(("splits", "members"), "i32"), "window": "i32" if masks else None, "scale": "fp32",
        "softcap": "fp32" if masks else None,
    }  # fmt: skip
    fixed = {"REP": 7, "WIDTH": width, "WIDE": wide, "INTERPRET": False}

    def case(kernel: Any, tiles: Tiles) -> CompileCase:
        constants = {k: v for k, v in tiles.constants().items() if k.isupper()}
        name = f"{kernel.fn.__name__} {tuple(tiles)} D={width} {kind[1:5]} int8={int8} masks={masks}"
        return compile_case(name, kernel, types, {**fixed, **constants}, tiles.warps, tiles.stages)

    tiles = dict.fromkeys(tiles_of(cc, dtype, width, n) for n in queries)
    return [*(case(prefix_kernel, t) for t in tiles), case(own_kernel, tiles_of(cc, dtype, width, 7))]
