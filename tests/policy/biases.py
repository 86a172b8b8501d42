"""xformers without its kernels: the documented semantics of its biases, and attention by them in plain tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class BlockDiagonal:
    """A bias of blocks; a block of t queries and n keys is lower triangular, from its top left or its bottom right
    corner, and with a window a band."""

    def __init__(self, queries: list[int], keys: list[int], bottom_right: bool, window: int | None = None):
        self.queries, self.keys, self.bottom_right, self.window = queries, keys, bottom_right, window

    def make_local_attention(self, window: int) -> BlockDiagonal:
        assert not self.bottom_right
        return BlockDiagonal(self.queries, self.keys, False, window)

    def make_local_attention_from_bottomright(self, window: int) -> BlockDiagonal:
        return BlockDiagonal(self.queries, self.keys, True, window)

    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert shape == (sum(self.queries), sum(self.keys))
        seen = torch.zeros(shape, dtype=torch.bool)
        row = column = 0
        for t, n in zip(self.queries, self.keys):
            for i in range(t):
                last = i + (n - t if self.bottom_right else 0)
                first = 0 if self.window is None else last - self.window + 1
                seen[row + i, column + max(first, 0) : column + min(last + 1, n)] = True
            row, column = row + t, column + n
        return torch.zeros(shape, dtype=dtype).masked_fill(~seen, -torch.inf)


class _Causal:
    @staticmethod
    def from_seqlens(q_seqlen, kv_seqlen=None, *, device=None):
        return BlockDiagonal(q_seqlen, kv_seqlen or q_seqlen, False)


class _FromBottomRight:
    @staticmethod
    def from_seqlens(q_seqlen, kv_seqlen=None, *, device=None):
        assert all(n >= t for t, n in zip(q_seqlen, kv_seqlen))
        return BlockDiagonal(q_seqlen, kv_seqlen, True)


DOCUMENTED = SimpleNamespace(
    BlockDiagonalCausalMask=_Causal, BlockDiagonalCausalFromBottomRightMask=_FromBottomRight
)  # fmt: skip


def ops_of(biases: Any) -> SimpleNamespace:
    """What stands for `xformers.ops`; `calls` counts."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, scale: float | None = None) -> Tensor:
        ops.calls += 1
        assert (
            q.dim() == k.dim() == v.dim() and q.shape[2:-1] == k.shape[2:-1] == v.shape[2:-1]
        )  # it broadcasts nothing
        if q.dim() == 5:  # grouped heads: no backward
            assert not torch.is_grad_enabled()
            out = attention(*(x.flatten(2, 3) for x in (q, k, v)), attn_bias, scale)
            return out.unflatten(2, q.shape[2:4])
        bias = attn_bias.materialize((q.shape[1], k.shape[1]), dtype=q.dtype)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + bias
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    ops = SimpleNamespace(fmha=SimpleNamespace(attn_bias=biases), memory_efficient_attention=attention, calls=0)
    return ops
