"""Keys and values of a packed row, copied to where an attention kernel looks for them: each prompt's to every
completion of its group, each head's to the query heads that share it.

One launch makes the copies; in the backward pass sums bring their gradients together again. Autograd's own way back
from an index is an addition by atomics, which rounds in the dtype of the gradient after each of G x heads terms, in any
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class KVCopies(NamedTuple):
    """Where the copies of a group's tokens are; groups come one after another, each with its prompt first.

    Attributes:
        prompt: its tokens.
        copies: of the prompt.
        shared: (copies * prompt,) int64, where the prompt's tokens are, copy after copy.
        own: int64, where each token behind the prompt is.
    """

    prompt: int
    copies: int
    shared: Tensor
    own: Tensor


def gather_kv(x: Tensor, index: Tensor, heads: int, copies: Sequence[KVCopies]) -> Tensor:
    """(S, heads, d): tokens `index` (S,) of keys or values (1, KV heads, L, d), each head repeated.

    Args:
        copies: the way back, a group each; entries of `index` that none of them names are padding, whose gradient is 0.
    """
    return _GatherKV.apply(x, index, heads // x.shape[1], copies)


class _GatherKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, repeats: int, copies: Sequence[KVCopies]) -> Tensor:
        ctx.copies, ctx.repeats, ctx.length = copies, repeats, x.shape[2]
        return x[0].transpose(0, 1)[:, :, None].expand(-1, -1, repeats, -1).index_select(0, index).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.repeats > 1:
            # With its dtype, or autocast would make it float32.
            grad = grad.unflatten(1, (-1, ctx.repeats)).sum(2, dtype=grad.dtype)
        out = grad.new_empty(ctx.length, *grad.shape[1:])
        begin = 0
        for group in ctx.copies:
            behind = begin + group.prompt
            end = behind + len(group.own)
            shared = grad.index_select(0, group.shared).unflatten(0, (group.copies, group.prompt))
            torch.sum(shared, 0, out=out[begin:behind])
            torch.index_select(grad, 0, group.own, out=out[behind:end])
            begin = end
        return out.transpose(0, 1)[None], None, None, None
