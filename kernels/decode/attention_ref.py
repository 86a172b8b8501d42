"""`decode_attention` by PyTorch's operators: the CPU's path, and the reference of the kernels.

Memory: scores (R, heads, P + a) float32, their weights, and a copy of what is int8.
"""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.decode.kv import KV, Rows
from torch import Tensor


def decode_attention_ref(
    query: Tensor,
    prompts: KV,
    own: KV,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The PyTorch path; the new keys and values are in `own` (R slots) already."""
    r, heads = query.shape[:2]
    p, t = rows.longest_prefix, rows.longest_own
    slots, kv_heads = len(rows.prefix), own.keys.shape[1]
    query = query.unflatten(1, (kv_heads, -1)) * scale  # (R, KVH, heads / KVH, D)
    scores = _scores(query, own, r, t)
    if p:
        # The queries of a group, (S, KVH, M * heads / KVH, D), meet each key of their prompt once.
        group = rows.grouped(query).transpose(1, 2)
        shared = _scores(group.flatten(2, 3), prompts, slots, p)
        shared = rows.ungrouped(shared.unflatten(2, group.shape[2:4]).transpose(1, 2))
        scores = torch.cat([shared, scores], 3)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    mask = rows.mask(window)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, kv_heads, -1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], 3)
    weights = scores.softmax(3)[..., : p + t]
    out = _weighted(weights[..., p:], own, r, t, query.dtype)
    if p:
        shared = rows.grouped(weights[..., :p]).transpose(1, 2)
        part = _weighted(shared.flatten(2, 3), prompts, slots, p, query.dtype)
        out = out + rows.ungrouped(part.unflatten(2, shared.shape[2:4]).transpose(1, 2))
    return out.reshape(r, heads, -1)


def _scores(query: Tensor, cache: KV, n: int, length: int) -> Tensor:
    """(N, KVH, m, length) float32 products of queries (N, KVH, m, D) with the first `length` keys."""
    keys = cache.keys[:n, :, :length].transpose(2, 3)
    if cache.key_scales is None:
        return (query @ keys.to(query.dtype)).float()
    # float16 would not hold the products before their scale.
    return query.float() @ keys.float() * cache.key_scales[:n, :, None, :length]


def _weighted(weights: Tensor, cache: KV, n: int, length: int, dtype: torch.dtype) -> Tensor:
    """(N, KVH, m, Dv) sums of the first `length` values under weights (N, KVH, m, length)."""
    if cache.value_scales is not None:
        weights = weights * cache.value_scales[:n, :, None, :length]
    return weights.to(dtype) @ cache.values[:n, :, :length].to(dtype)
