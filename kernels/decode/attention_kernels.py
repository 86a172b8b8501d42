"""The Triton kernels of `attention_triton.py`: prefix, own and merge, and the online softmax of the first two."""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON, jit, tl
from lowvram_grpo.kernels.transform import LOWEST, transform_logit

_constant = tl.constexpr if HAS_TRITON else float
_LOWEST, _LOG2E = _constant(LOWEST), _constant(1.4426950408889634)
_LARGEST, _TINY = _constant(127.0), _constant(torch.finfo(torch.float32).tiny)
# Added and taken off again, it leaves a float32 below 2^22 rounded to the nearest integer, half to even.
_ROUND = _constant(1.5 * 2**23)


@jit
def _attend(
    q, m, s, acc, keys, values, key_scales, value_scales, first, last, low, token, scale, softcap,
    WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Fold keys first to first + KEYS, but not `last`, into the online softmax (m, s, acc) of queries q (Q, D); `low`
    (Q,): the first key that each sees, None for all."""
    n = first + tl.arange(0, KEYS)
    d = tl.arange(0, q.shape[1])
    inside = n < last
    there = inside[:, None] & (d < WIDTH)[None, :]
    at = n[:, None] * token + d[None, :]
    k = tl.load(keys + at, mask=there, other=0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if key_scales is not None:
        scores *= tl.load(key_scales + n, mask=inside, other=0.0)[None, :]
    scores = transform_logit(scores, scale, softcap, _LOG2E)
    seen = inside[None, :]
    if low is not None:
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
    WIDTH: tl.constexpr, KEYS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    if INTERPRET:  # Triton 3.6 interprets no range of a runtime length
        while first < last:
            m, s, acc = _attend(
                q, m, s, acc, keys, values, key_scales, value_scales, first, last, low, token, scale, softcap,
                WIDTH, KEYS,
            )  # fmt: skip
            first += KEYS
    else:
        # Only a `for` has its loads pipelined.
        for n in tl.range(first, last, KEYS):
            m, s, acc = _attend(
                q, m, s, acc, keys, values, key_scales, value_scales, n, last, low, token, scale, softcap,
                WIDTH, KEYS,
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
def prefix_kernel(
    query, keys, values, key_scales, value_scales, age_ptr, prefix_ptr, members_ptr, out, lse,
    query_row, query_head, slot_stride, head_stride, token_stride, scale_slot, scale_head,
    splits, members, window, scale, softcap,
    REP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    LEAST: tl.constexpr, INTERPRET: tl.constexpr,
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
    low = None
    first = 0
    if window is not None:
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
        scale, softcap, WIDTH, KEYS, INTERPRET,
    )  # fmt: skip
    _leave(out, lse, at, alive, m, s, acc, WIDTH, WIDE)


@jit
def _append(ptr, x, scales, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Write x (WIDE,) to ptr, and its scale to `scales`, as `kv.write` does; what the cache then says, in
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
def own_kernel(
    query, key, value, keys, values, key_scales, value_scales, age_ptr, rank_ptr, out, lse,
    query_row, query_head, key_row, key_head, value_row, value_head,
    row_stride, head_stride, token_stride, scale_row, scale_head, splits, window, scale, softcap,
    REP: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    LEAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, split = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, QUERIES)
    alive = place < REP
    query_heads = head * REP + place
    age = tl.load(age_ptr + row).to(tl.int32)
    low = 0
    if window is not None:
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
        q, m, s, acc, keys + offset, values + offset, key_scales, value_scales, begin, end, None, token_stride,
        scale, softcap, WIDTH, KEYS, INTERPRET,
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
        score = transform_logit(tl.sum(q.to(tl.float32) * k[None, :], 1), scale, softcap, _LOG2E)
        m_new = tl.maximum(m, score)
        decay = tl.exp2(m - m_new)
        p = tl.exp2(score - m_new)
        s = decay * s + p
        acc = acc * decay[:, None] + p[:, None] * v[None, :]
        m = m_new
    _leave(out, lse, at, alive, m, s, acc, WIDTH, WIDE)


@jit
def merge_kernel(
    parts, lse, rank_ptr, sinks, out, prefix_splits, splits, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = row * tl.num_programs(1) + tl.program_id(1)
    # The places of a row without a rank were written by no prefix program.
    begin = tl.where(tl.load(rank_ptr + row) < 0, prefix_splits, 0)
    d = tl.arange(0, WIDE)
    # Split 0 of its own tokens never is empty.
    m = tl.full([], _LOWEST, tl.float32)
    s = tl.zeros([], tl.float32)
    if sinks is not None:
        m = tl.load(sinks + tl.program_id(1)).to(tl.float32) * _LOG2E
        s += 1.0
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
