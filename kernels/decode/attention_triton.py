"""The Triton kernels of `decode_attention`: three launches whose grids depend on nothing but shapes.

    prefix   (slot and block of its queries, KV head, split): the queries of a prompt's members, gathered through
             `members`, against one of `splits.prefix` ranges of the keys that any of them sees
    own      (row, KV head, split): a row's queries against one of `splits.own` ranges of its own cached tokens. Split 0
             writes the new token to the cache and attends to what it has of it in registers: nobody reads it back
    merge    (row, head): the ranges' outputs o_i, weighted by their log-sum-exps: sum_i e^(lse_i - lse) o_i

What changes from step to step (prefix, age, members, rank) is read from device tensors, so that a step can be captured
in a CUDA graph; nothing is read back. Each range is an even share of the keys that there are, not of the buffer's
length; a program whose range is empty writes a log-sum-exp of -inf and leaves. Sums are float32 under an online
softmax (arXiv:1805.02867) in powers of two; the ranges are flash-decoding's (pytorch.org/blog/flash-decoding).

Memory: (R, heads, splits.prefix + splits.own) outputs of D floats, and their log-sum-exps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lowvram_grpo.kernels.decode.launch import Splits, Tiles, card, power_of_2, ranges, tiles_of
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, device_guard, interpreted, jit, tl
from lowvram_grpo.kernels.sweep.fold import LOWEST, transform_logit
from torch import Tensor

if TYPE_CHECKING:
    from lowvram_grpo.kernels.decode.attention import KV, Rows

_constant = tl.constexpr if HAS_TRITON else float
_LOWEST, _LOG2E = _constant(LOWEST), _constant(1.4426950408889634)
_LARGEST, _TINY = _constant(127.0), _constant(torch.finfo(torch.float32).tiny)
# Added and taken off again, it leaves a float32 below 2^22 rounded to the nearest integer, half to even.
_ROUND = _constant(1.5 * 2**23)
_MERGED = 8  # ranges that the merge holds at a time
_KINDS = {torch.float16: "*fp16:16", torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}


@jit
def _attend(
    q, m, s, acc, keys, values, key_scales, value_scales, first, last, low, token, scale, softcap,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Fold keys first to first + KEYS, but not `last`, into the online softmax (m, s, acc) of queries q (Q, D)."""
    n = first + tl.arange(0, KEYS)
    d = tl.arange(0, q.shape[1])
    inside = n < last
    there = inside[:, None] & (d < WIDTH)[None, :]
    at = n[:, None] * token + d[None, :]
    k = tl.load(keys + at, mask=there, other=0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if key_scales is not None:
        scores *= tl.load(key_scales + n, mask=inside, other=0.0)[None, :]
    scores = transform_logit(scores, scale, softcap, _LOG2E, SOFTCAP)
    seen = inside[None, :]
    if WINDOW:
        seen = seen & (n[None, :] >= low[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    decay = tl.exp2(m - m_new)
    p = tl.exp2(scores - m_new[:, None])
    s = decay * s + tl.sum(p, 1)
    v = tl.load(values + at, mask=there, other=0).to(q.dtype)
    if value_scales is not None:
        p *= tl.load(value_scales + n, mask=inside, other=0.0)[None, :]
    acc = tl.dot(p.to(q.dtype), v, acc * decay[:, None], input_precision="ieee")
    return m_new, s, acc


@jit
def _attend_range(
    q, m, s, acc, keys, values, key_scales, value_scales, first, last, low, token, scale, softcap,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    if INTERPRET:  # Triton 3.6 interprets no range of a runtime length
        while first < last:
            m, s, acc = _attend(
                q, m, s, acc, keys, values, key_scales, value_scales, first, last, low, token, scale, softcap,
                SOFTCAP, WINDOW, WIDTH, KEYS,
            )  # fmt: skip
            first += KEYS
    else:
        # Only a `for` has its loads pipelined.
        for n in tl.range(first, last, KEYS):
            m, s, acc = _attend(
                q, m, s, acc, keys, values, key_scales, value_scales, n, last, low, token, scale, softcap,
                SOFTCAP, WINDOW, WIDTH, KEYS,
            )  # fmt: skip
    return m, s, acc


@jit
def _share(split, splits, first, last, LEAST: tl.constexpr, KEYS: tl.constexpr):
    """The range of keys first to last that is `split`'s: at least LEAST tiles, as long as there are keys."""
    tiles = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), KEYS), splits), LEAST)
    begin = first + split * tiles * KEYS
    return begin, tl.minimum(begin + tiles * KEYS, last)


@jit
def _leave(out, lse, at, alive, m, s, acc, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Store the outputs (Q, D) and log-sum-exps (Q,) of one range at places `at` (Q,)."""
    some = s > 0  # a row's window may end before this range
    s = tl.where(some, s, 1.0)
    tl.store(lse + at, tl.where(some, m + tl.log2(s), float("-inf")), mask=alive)
    d = tl.arange(0, WIDE)
    there = (alive & some)[:, None] & (d < WIDTH)[None, :]
    tl.store(out + at[:, None] * WIDTH + d[None, :], acc / s[:, None], mask=there)


@jit
def _prefix_kernel(
    query, keys, values, key_scales, value_scales, age_ptr, prefix_ptr, members_ptr, out, lse,
    query_row, query_head, slot_stride, head_stride, token_stride, scale_slot, scale_head,
    splits, members, window, scale, softcap,
    REP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    LEAST: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # Blocks of queries vary fastest, so that programs that run together read the same keys out of L2.
    blocks = tl.cdiv(members * REP, QUERIES)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    head, split = tl.program_id(1), tl.program_id(2)
    place = (tl.program_id(0) % blocks) * QUERIES + tl.arange(0, QUERIES)
    row = tl.load(members_ptr + slot * members + place // REP, mask=place < members * REP, other=-1)
    alive = row >= 0
    row = tl.maximum(row, 0)
    query_heads = head * REP + place % REP
    last = tl.load(prefix_ptr + slot).to(tl.int32)
    low = tl.zeros([QUERIES], tl.int32)
    first = 0
    if WINDOW:
        age = tl.load(age_ptr + row, mask=alive, other=0).to(tl.int32)
        low = tl.where(alive, tl.maximum(last + age - window + 1, 0), last)
        first = tl.min(low, 0)
    begin, end = _share(split, tl.num_programs(2), first, last, LEAST, KEYS)
    at = (row * (tl.num_programs(1) * REP) + query_heads) * splits + split
    if (begin >= end) | (tl.max(alive.to(tl.int32), 0) == 0):
        tl.store(lse + at, tl.full([QUERIES], float("-inf"), tl.float32), mask=alive)
        return
    d = tl.arange(0, WIDE)
    q = tl.load(
        query + row[:, None] * query_row + query_heads[:, None] * query_head + d[None, :],
        mask=alive[:, None] & (d < WIDTH)[None, :], other=0.0,
    )  # fmt: skip
    if INTERPRET:  # its dot product would take the bits of bfloat16 for integers
        q = q.to(tl.float32)
    offset = slot * slot_stride + head.to(tl.int64) * head_stride
    if key_scales is not None:
        key_scales += slot * scale_slot + head * scale_head
        value_scales += slot * scale_slot + head * scale_head
    m = tl.full([QUERIES], _LOWEST, tl.float32)
    s = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, WIDE], tl.float32)
    m, s, acc = _attend_range(
        q, m, s, acc, keys + offset, values + offset, key_scales, value_scales, begin, end, low, token_stride,
        scale, softcap, SOFTCAP, WINDOW, WIDTH, KEYS, INTERPRET,
    )  # fmt: skip
    _leave(out, lse, at, alive, m, s, acc, WIDTH, WIDE)


@jit
def _append(ptr, x, scales, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Write x (WIDE,) to ptr, and its scale to `scales`, as `decode_attention.write` does; what the cache then says, in
    float32."""
    d = tl.arange(0, WIDE)
    if scales is None:
        kept = x.to(ptr.dtype.element_ty)
        tl.store(ptr + d, kept, mask=d < WIDTH)
        kept = kept.to(tl.float32)
    else:
        x = x.to(tl.float32)
        unit = tl.max(tl.abs(x), 0) * (1.0 / _LARGEST)
        codes = tl.div_rn(x, tl.zeros_like(x) + tl.maximum(unit, _TINY))
        codes = (codes + _ROUND) - _ROUND
        codes = tl.minimum(tl.maximum(codes, -_LARGEST), _LARGEST)
        tl.store(ptr + d, codes.to(tl.int8), mask=d < WIDTH)
        tl.store(scales, unit)
        kept = codes * unit
    return kept


@jit
def _own_kernel(
    query, key, value, keys, values, key_scales, value_scales, age_ptr, rank_ptr, out, lse,
    query_row, query_head, key_row, key_head, value_row, value_head,
    row_stride, head_stride, token_stride, scale_row, scale_head, splits, window, scale, softcap,
    REP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    LEAST: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, split = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, QUERIES)
    alive = place < REP
    query_heads = head * REP + place
    age = tl.load(age_ptr + row).to(tl.int32)
    low = 0
    if WINDOW:
        low = tl.maximum(age - window + 1, 0)
    # Nobody waits for a row without a rank: its new token is all that it sees.
    low = tl.where(tl.load(rank_ptr + row) < 0, age, low)
    begin, end = _share(split, tl.num_programs(2), low, age, LEAST, KEYS)
    at = (row * (tl.num_programs(1) * REP) + query_heads) * splits + splits - tl.num_programs(2) + split
    if (begin >= end) & (split > 0):
        tl.store(lse + at, tl.full([QUERIES], float("-inf"), tl.float32), mask=alive)
        return
    d = tl.arange(0, WIDE)
    q = tl.load(
        query + row * query_row + query_heads[:, None] * query_head + d[None, :],
        mask=alive[:, None] & (d < WIDTH)[None, :], other=0.0,
    )  # fmt: skip
    if INTERPRET:
        q = q.to(tl.float32)
    offset = row * row_stride + head.to(tl.int64) * head_stride
    scale_offset = row * scale_row + head * scale_head
    if key_scales is not None:
        key_scales += scale_offset
        value_scales += scale_offset
    m = tl.full([QUERIES], _LOWEST, tl.float32)
    s = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, WIDE], tl.float32)
    # The range begins at the first token that the one row sees: no key of it is masked.
    m, s, acc = _attend_range(
        q, m, s, acc, keys + offset, values + offset, key_scales, value_scales, begin, end, low, token_stride,
        scale, softcap, SOFTCAP, False, WIDTH, KEYS, INTERPRET,
    )  # fmt: skip
    if split == 0:
        k = tl.load(key + row * key_row + head * key_head + d, mask=d < WIDTH, other=0.0)
        v = tl.load(value + row * value_row + head * value_head + d, mask=d < WIDTH, other=0.0)
        new = offset + age.to(tl.int64) * token_stride
        if key_scales is not None:
            key_scales += age
            value_scales += age
        k = _append(keys + new, k, key_scales, WIDTH, WIDE)
        v = _append(values + new, v, value_scales, WIDTH, WIDE)
        score = transform_logit(tl.sum(q.to(tl.float32) * k[None, :], 1), scale, softcap, _LOG2E, SOFTCAP)
        m_new = tl.maximum(m, score)
        decay = tl.exp2(m - m_new)
        p = tl.exp2(score - m_new)
        s = decay * s + p
        acc = acc * decay[:, None] + p[:, None] * v[None, :]
        m = m_new
    _leave(out, lse, at, alive, m, s, acc, WIDTH, WIDE)


@jit
def _merge_kernel(
    parts, lse, rank_ptr, out, prefix_splits, splits, BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = row * tl.num_programs(1) + tl.program_id(1)
    # The places of a row without a rank were written by no prefix program.
    begin = tl.where(tl.load(rank_ptr + row) < 0, prefix_splits, 0)
    d = tl.arange(0, WIDE)
    # Split 0 of its own tokens never is empty.
    m = tl.full([], _LOWEST, tl.float32)
    s = tl.zeros([], tl.float32)
    acc = tl.zeros([WIDE], tl.float32)
    i = 0
    while i < splits:
        split = i + tl.arange(0, BLOCK)
        part = tl.load(lse + at * splits + split, mask=(split >= begin) & (split < splits), other=float("-inf"))
        m_new = tl.maximum(m, tl.max(part, 0))
        p = tl.exp2(part - m_new)
        decay = tl.exp2(m - m_new)
        s = s * decay + tl.sum(p, 0)
        there = (part > float("-inf"))[:, None] & (d < WIDTH)[None, :]
        x = tl.load(parts + (at * splits + split)[:, None] * WIDTH + d[None, :], mask=there, other=0.0)
        acc = acc * decay + tl.sum(p[:, None] * x, 0)
        m = m_new
        i += BLOCK
    tl.store(out + at * WIDTH + d, (acc / s).to(out.dtype.element_ty), mask=d < WIDTH)


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
    numbers = (window or 0, scale, softcap or 1.0)
    fixed = {
        "REP": rep, "WIDTH": width, "WIDE": wide, "SOFTCAP": softcap is not None, "WINDOW": window is not None,
        "INTERPRET": interpreted(),
    }  # fmt: skip
    with device_guard(query):
        if splits.prefix:
            _prefix_kernel[(slots * blocks, kv_heads, splits.prefix)](
                query, *prompts, rows.age, rows.prefix, rows.members, parts, lse, *query.stride()[:2],
                *_strides(prompts), sum(splits), members, *numbers, **tiles.constants(), **fixed,
            )  # fmt: skip
        _own_kernel[(r, kv_heads, splits.own)](
            query, key, value, *own, rows.age, rows.rank, parts, lse, *query.stride()[:2], *key.stride()[:2],
            *value.stride()[:2], *_strides(own), sum(splits), *numbers, **own_tiles.constants(), **fixed,
        )  # fmt: skip
        _merge_kernel[(r, heads)](
            parts, lse, rows.rank, out, splits.prefix, sum(splits), BLOCK=_MERGED, WIDTH=width,
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
    for width in (64, 80, 256):
        cases += _cases(cc, half, width, (64,), int8=False, masks=False)
        cases += _cases(cc, half, width, (64, 32, 16), int8=True, masks=True)
        cases += _cases(cc, torch.float32, width, (64,), int8=False, masks=True)
        for out in (half, torch.float16, torch.float32) if half != torch.float16 else (half, torch.float32):
            types = {
                "parts": "*fp32:16", "lse": "*fp32:16", "rank_ptr": "*i64:16", "out": _KINDS[out],
                "prefix_splits": "i32", "splits": "i32",
            }  # fmt: skip
            sizes = {"BLOCK": _MERGED, "WIDTH": width, "WIDE": power_of_2(width)}
            cases.append(compile_case(f"merge {_KINDS[out][1:5]} D={width}", _merge_kernel, types, sizes, 2, 1))
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
        **dict.fromkeys(("splits", "members", "window"), "i32"), **dict.fromkeys(("scale", "softcap"), "fp32"),
    }  # fmt: skip
    fixed = {
        "REP": 7, "WIDTH": width, "WIDE": wide, "SOFTCAP": masks, "WINDOW": masks, "INTERPRET": False,
    }  # fmt: skip

    def case(kernel: Any, tiles: Tiles) -> CompileCase:
        constants = {k: v for k, v in tiles.constants().items() if k.isupper()}
        name = f"{kernel.fn.__name__} {tuple(tiles)} D={width} {kind[1:5]} int8={int8} masks={masks}"
        return compile_case(name, kernel, types, {**fixed, **constants}, tiles.warps, tiles.stages)

    tiles = dict.fromkeys(tiles_of(cc, dtype, width, n) for n in queries)
    return [*(case(_prefix_kernel, t) for t in tiles), case(_own_kernel, tiles_of(cc, dtype, width, 7))]
