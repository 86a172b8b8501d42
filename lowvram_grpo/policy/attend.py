"""Attention by its formula, and what today's models add to it: sinks, and soft-capped scores. Never all scores at once.

    out_i = sum_j p_ij v_j,    p_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink)),    s_ij = cap(scale q_i . k_j)

A sink is a number a head that takes its share of the softmax and gives nothing (gpt-oss). It needs no kernel of its
own: with lse_i = log sum_j exp(s_ij), which kernels keep for their backward pass, and total_i = log(exp(lse_i) +
exp(sink)),

    out = out without sink * sigmoid(lse - sink)
    dsink = - sum_i exp(sink - total_i) out_i . dout_i

and the gradients to q, k and v are those that the kernel's own backward pass gives for (out, total) in the place of
(out, lse): it makes p_ij of exp(s_ij - total_i), and dp_ij of dout_i . v_j - dout_i . out_i. An extra key would do as
well, but only one with a column in q and k of its own, copies of both, and a sink rounded to their dtype.

No kernel caps scores. `attend_by_blocks` makes them for so many queries at a time, and again in the backward pass.

Sources: arXiv:2309.17453 and the gpt-oss model card (sinks), arXiv:2408.00118 (Gemma 2, soft-capping), arXiv:2205.14135
(attention's backward pass by log-sum-exps).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_grpo.errors import is_out_of_memory, one_line
from lowvram_grpo.kernels.runtime import trial

_BLOCK = 256  # queries whose scores are held at a time
_LOWEST = torch.finfo(torch.float32).min  # of a masked score: a row that sees nothing must not become NaN
_ALIGNED = 16  # entries of a bias' row, for CUDA's memory-efficient kernel; 8 numbers of a head


def causal_mask(before: int, t: int, window: int | None, device: torch.device) -> Tensor:
    """(t, before + t) bool: which keys t tokens behind `before` others see, each itself and what is before it, within
    `window`."""
    mask = torch.ones(t, before + t, dtype=torch.bool, device=device).tril_(before)
    return mask if window is None else mask.triu_(before - window + 1)


def causal_bias(before: int, t: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`causal_mask` as what CUDA's memory-efficient kernel adds to its scores: (t, before + t), 0 or -inf, rows 16
    entries aligned. A mask of bools would be converted, and one of other strides padded, in every layer's call."""
    return _aligned_bias(causal_mask(before, t, window, device), dtype)


def _aligned_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    keys = mask.shape[-1]
    bias = torch.zeros(*mask.shape[:-1], -(-keys // _ALIGNED) * _ALIGNED, dtype=dtype, device=mask.device)[..., :keys]
    return bias.masked_fill_(~mask, -torch.inf)


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, KV heads, L, d), each head as often as `heads` query heads share it."""
    repeats = heads // x.shape[1]
    return x if repeats == 1 else x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def attend_causally(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, causal where there is no mask (bool, or a bias in the dtype of q). Only without a mask do
    CUDA's kernels know of grouped heads, and not all of them, so K and V are repeated.

    On meta it is the kernel that CUDA takes: PyTorch would count the T x T tensors of its plain formula.

    Args:
        sinks: (heads,), see above.
    """
    if sinks is not None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if _kernel_takes(q, v, dropout):
            k, v = (repeat_kv(x, q.shape[1]) for x in (k, v))
            return _WithSinks.apply(q, k, v, sinks, mask, scale)
        return attend_by_blocks(q, k, v, scale=scale, dropout=dropout, sinks=sinks, mask=mask)
    k, v = (repeat_kv(x, q.shape[1]) for x in (k, v))
    if q.is_meta:
        # CUDA's kernel adds its mask, one of the dtype of q.
        bias = mask
        if mask is not None and mask.dtype == torch.bool:
            bias = torch.empty_like(mask, dtype=q.dtype)
        bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
        saves = torch.is_grad_enabled()
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(q, k, v, bias, saves, dropout, is_causal=mask is None, scale=scale)[0]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
    )


# Sinks, by the log-sum-exps of PyTorch's kernels


def _kernel_takes(q: Tensor, v: Tensor, dropout: float) -> bool:
    if dropout or q.shape[-1] != v.shape[-1]:
        return False
    return q.device.type in ("cpu", "meta") or (q.is_cuda and _kernel_works(q.device, q.dtype))


@trial
def _kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether CUDA's memory-efficient kernel is there for this dtype, and does with another log-sum-exp what is said
    above: its operators are PyTorch's private ones."""
    made = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 2, n, 16, generator=made, device="cpu").to(device, dtype) for n in (5, 7, 7)]
    sinks, mask = torch.tensor([0.5, -1.0], device="cpu").to(device), causal_mask(2, 5, 4, device)
    found = []
    try:
        for by_kernel in (True, False):
            with torch.enable_grad():
                given = [x.clone().requires_grad_() for x in (*drawn, sinks)]
                if by_kernel:
                    out = _WithSinks.apply(*given, mask, 0.3)
                else:
                    out = attend_by_blocks(*given[:3], scale=0.3, sinks=given[3], mask=mask)
                (out.float() * torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)).sum().backward()
            found.append([out.detach(), *(x.grad for x in given)])
        near = 0.01 if dtype == torch.float32 else 0.05
        assert all(torch.allclose(a.float(), b.float(), rtol=near, atol=near) for a, b in zip(*found)), "it is wrong"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        warnings.warn(
            f"PyTorch's memory-efficient attention does not take sinks here ({one_line(error)}), so scores are made "
            "for 256 tokens at a time, which is slower.",
            stacklevel=2,
        )
        return False
    return True


class _WithSinks(torch.autograd.Function):
    """q, k, v (B, heads, L, d), of one number of heads, sinks (heads,); the mask as in `attend_causally`."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        width = q.shape[3]
        padded = -width % 8 if q.device.type != "cpu" else 0
        q, k, v = (F.pad(x, (0, padded)) if padded else x for x in (q, k, v))
        mask = _bias_of(mask, q, k)
        if q.device.type == "cpu":
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, lse = fused(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
            random = ()
        else:
            fused = torch.ops.aten._scaled_dot_product_efficient_attention
            out, lse, *random = fused(q, k, v, mask, True, 0.0, mask is None, scale=scale)
        # Beyond the L queries CUDA's kernel has padding, which stays what it is: inf.
        sink = sinks.to(lse.dtype)[:, None]
        total = torch.logaddexp(lse, sink)
        out = out * torch.sigmoid(lse - sink)[:, :, : q.shape[2], None].to(out.dtype)
        ctx.save_for_backward(q, k, v, sinks, mask, out, total, *random)
        ctx.scale, ctx.width = scale, width
        return out[..., :width] if padded else out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, mask, out, total, *random = ctx.saved_tensors
        if out.shape[3] > ctx.width:
            grad = F.pad(grad, (0, out.shape[3] - ctx.width))
        to_sinks = None
        if ctx.needs_input_grad[3]:
            share = (sinks.to(total.dtype)[:, None] - total[:, :, : q.shape[2]]).exp_()
            to_sinks = -(share * (grad.to(total.dtype) * out.to(total.dtype)).sum(3)).sum((0, 2)).to(sinks.dtype)
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, to_sinks, None, None
        if q.device.type == "cpu":
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            found = fused(grad, q, k, v, out, total, 0.0, mask is None, attn_mask=mask, scale=ctx.scale)
        else:
            fused = torch.ops.aten._scaled_dot_product_efficient_attention_backward
            wanted = [True, True, True, False]
            found = fused(grad, q, k, v, mask, out, total, *random, 0.0, wanted, mask is None, scale=ctx.scale)[:3]
        return *(x[..., : ctx.width] for x in found), to_sinks, None, None


def _bias_of(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """In the dtype of q, (B, heads, L, S) where CUDA's kernel wants it so."""
    if mask is None:
        return None
    bias = _aligned_bias(mask, q.dtype) if mask.dtype == torch.bool else mask.to(q.dtype)
    return bias if q.device.type == "cpu" else bias.expand(*q.shape[:3], k.shape[2])


# Scores of some queries at a time


class _Scores(NamedTuple):
    """What makes weights of queries and keys; see `attend_by_blocks`."""

    scale: float
    softcap: float | None
    dropout: float
    mask: Tensor | None
    before: int
    window: int | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, first: int, last: int) -> Tensor:
        """(B, KVH, heads / KVH, last - first, Dv) of those queries, which see none but the keys that are given."""
        seen = k.shape[2]
        scores = q @ k[:, :, None].transpose(3, 4) * self.scale
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_() * self.softcap
        if self.mask is None:
            mask = causal_mask(self.before + first, last - first, self.window, q.device)
        else:
            mask = self.mask[..., first:last, :seen]
            mask = mask[:, :, None] if mask.dim() == 4 else mask
        unseen = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        scores = scores if mask.dtype == torch.bool else scores + mask
        scores = scores.masked_fill_(unseen, _LOWEST)
        if sinks is not None:
            column = sinks.to(scores.dtype).view(1, k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., :seen]
        if self.dropout:
            weights = F.dropout(weights, self.dropout)
        return weights.to(v.dtype) @ v[:, :, None]

    def blocks(self, queries: int, keys: int) -> list[tuple[int, int, int]]:
        """(first, last, keys that any of these queries sees) of each."""
        spans = [(first, min(first + _BLOCK, queries)) for first in range(0, queries, _BLOCK)]
        return [(a, b, keys if self.mask is not None else self.before + b) for a, b in spans]


def attend_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    mask: Tensor | None = None,
    before: int = 0,
    window: int | None = None,
) -> Tensor:
    """(B, heads, L, Dv) of queries (B, heads, L, D), keys (B, KV heads, S, D) and values; float32 scores of `_BLOCK`
    queries at a time, in the backward pass too.

    Args:
        softcap: c of scores c * tanh(score / c).
        sinks: (heads,).
        mask: (L, S) or (B or 1, 1, L, S), bool or a bias; without one, L queries behind `before` other tokens, S
            together, see themselves and what is before them, within `window`.
    """
    case = _Scores(scale, softcap, dropout, mask, before, window)
    q = q.unflatten(1, (k.shape[1], -1))
    if torch.is_grad_enabled() and not dropout:
        return _ByBlocks.apply(q, k, v, sinks, case).flatten(1, 2)
    return _all_blocks(q, k, v, sinks, case).flatten(1, 2)


def _all_blocks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, case: _Scores) -> Tensor:
    parts = case.blocks(q.shape[3], k.shape[2])
    return torch.cat([case.attend(q[:, :, :, a:b], k[:, :, :n], v[:, :, :n], sinks, a, b) for a, b, n in parts], 3)


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, case: _Scores) -> Tensor:
        ctx.case = case
        ctx.save_for_backward(q, k, v, sinks)
        return _all_blocks(q, k, v, sinks, case)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        into = [torch.zeros_like(x) for x in (q, k, v)] + [None if sinks is None else torch.zeros_like(sinks)]
        for first, last, seen in ctx.case.blocks(q.shape[3], k.shape[2]):
            rows, keys = (..., slice(first, last), slice(None)), (..., slice(0, seen), slice(None))
            places = [rows, keys, keys, ...]
            with torch.enable_grad():
                parts = [
                    None if x is None else x[at].detach().requires_grad_() for x, at in zip((q, k, v, sinks), places)
                ]
                out = ctx.case.attend(*parts, first, last)
            given = [x for x in parts if x is not None]
            for total, at, found in zip(into, places, torch.autograd.grad(out, given, grad[rows])):
                total[at] += found
        return *into, None
