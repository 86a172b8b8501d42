"""From hidden states to per-token log-probs and entropy in one sweep over the vocabulary.

For N scored tokens with hidden state h, target t and temperature T, with l = softcap(scale * (W h + b)) / T:

    logp = l_t - lse(l)          entropy = lse(l) - sum_v p_v l_v
    d logp / d h = scale / T * (s_t W_t - sum_v p_v s_v W_v),   s = d softcap (1 without soft-capping)

The sum over v is an attention with K = V = W, so an online softmax with rescaling (Milakov & Gimelshein 2018,
arXiv:1805.02867; FlashAttention, Dao et al. 2022) yields it in the same pass: whatever the loss does with `logp`, its
backward is one elementwise product `c * g`. Two products of N*V*H multiply-adds in all (4NVH FLOP), none in the
backward. A trainable head needs dW as well and recomputes the tiles in its backward instead (8NVH).

Memory: one tile of logits and probabilities (`workspace_mib` bounds it) plus the direction, N*H*4 bytes. Logits are
float32 from float32 accumulation and no N x V tensor is ever made, on any device.

This file holds the plain PyTorch version, which is also the reference for the Triton version.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_grpo.policy.head import Head

# Where an online maximum starts: finite, so that 0 * (m - m_new) stays 0.
_LOWEST = -1e30


class LinearLogps(NamedTuple):
    """float32 tensors of shape (N,); None where not asked for. `logps` is differentiable, `entropy` is not."""

    logps: Tensor
    entropy: Tensor | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None


class TilePlan(NamedTuple):
    """How a sweep is cut: `rows` hidden states by `columns` vocabulary entries at a time."""

    rows: int
    columns: int


def plan_tiles(n: int, vocab: int, hidden: int, workspace_mib: int) -> TilePlan:
    """Cut (n, vocab) so that float32 copies of a row block (rows x H), of a weight tile (columns x H) and three tiles
    of rows x columns stay inside the workspace."""
    floats = workspace_mib * 2**20 // 4
    rows = max(1, min(n, floats // (4 * hidden)))
    columns = max(1, min(vocab, (floats - rows * hidden) // (3 * rows + hidden)))
    return TilePlan(rows, columns)


def _logits_tile(
    h: Tensor, w: Tensor, b: Tensor | None, head: Head, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """float32 logits (R, C) of one tile after scale, soft-cap and temperature; the soft-cap's slope (R, C) or None."""
    logits = h @ w.T
    if b is not None:
        logits += b.float()
    if head.logit_scale != 1.0:
        logits *= head.logit_scale
    slope = None
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_()
        slope = 1 - logits.square()
        logits *= head.softcap
    if temperature != 1.0:
        logits /= temperature
    return logits, slope


def _sweep_rows(h: Tensor, head: Head, targets: Tensor, temperature: float, columns: int, direction: bool):
    """One row block: (logps, entropy, lse, direction or None). h is float32 (R, H), targets (R,)."""
    n = h.shape[0]
    m = h.new_full((n,), _LOWEST)
    s, plogp, target_logit = h.new_zeros(n), h.new_zeros(n), h.new_zeros(n)
    mean_w = torch.zeros_like(h) if direction else None
    target_w = torch.zeros_like(h) if direction else None
    for v0, w_tile, b_tile in head.tiles(columns):
        w = w_tile.detach().float()
        logits, slope = _logits_tile(h, w, None if b_tile is None else b_tile.detach(), head, temperature)
        here = (targets >= v0) & (targets < v0 + w.shape[0])
        at = (targets - v0).clamp(0, w.shape[0] - 1)
        target_logit = torch.where(here, logits.gather(1, at[:, None])[:, 0], target_logit)
        m_new = torch.maximum(m, logits.amax(1))
        decay = (m - m_new).exp()
        shifted = logits.sub_(m_new[:, None])
        p = shifted.exp()
        plogp = decay * (plogp + s * (m - m_new)) + torch.linalg.vecdot(p, shifted)
        s = decay * s + p.sum(1)
        m = m_new
        if direction:
            if slope is not None:
                rows = here.nonzero()[:, 0]
                target_w[rows] = w[at[rows]] * slope[rows, at[rows], None]
                p *= slope
            elif here.any():
                rows = here.nonzero()[:, 0]
                target_w[rows] = w[at[rows]]
            torch.addmm(mean_w.mul_(decay[:, None]), p, w, out=mean_w)
    log_s = s.log()
    lse = m + log_s
    g = None
    if direction:
        g = target_w.sub_(mean_w.div_(s[:, None])).mul_(head.logit_scale / temperature)
    return target_logit - lse, log_s - plogp / s, lse, g


def _sweep(hidden: Tensor, head: Head, targets: Tensor, temperature: float, workspace_mib: int, direction: bool):
    """The sweep over all rows; outputs as `_sweep_rows`, concatenated."""
    n, width = hidden.shape
    plan = plan_tiles(n, head.weight.shape[0], width, workspace_mib)
    logps, entropy, lse = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(3))
    g = torch.empty(n, width, dtype=torch.float32, device=hidden.device) if direction else None
    for r0 in range(0, n, plan.rows):
        block = slice(r0, r0 + plan.rows)
        out = _sweep_rows(hidden[block].float(), head, targets[block], temperature, plan.columns, direction)
        logps[block], entropy[block], lse[block] = out[:3]
        if direction:
            g[block] = out[3]
    return logps, entropy, lse, g


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast would quietly turn the float32 products of the sweep into bfloat16 ones."""
    return torch.autocast(tensor.device.type, enabled=False)


class _FrozenHead(torch.autograd.Function):
    """Gradient to the hidden states only: the direction is computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, targets, head, temperature, workspace_mib, direction):
        with _without_autocast(hidden):
            logps, entropy, _, g = _sweep(hidden, head, targets, temperature, workspace_mib, direction)
        ctx.save_for_backward(g)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, _):
        (g,) = ctx.saved_tensors
        return (grad_logps[:, None] * g).to(ctx.dtype), None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """Gradients to hidden states, weight and bias: logits are recomputed tile by tile in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head, temperature, workspace_mib):
        with _without_autocast(hidden):
            logps, entropy, lse, _ = _sweep(hidden, head, targets, temperature, workspace_mib, False)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.head, ctx.temperature, ctx.workspace_mib = head, temperature, workspace_mib
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, _):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        head, temperature = ctx.head, ctx.temperature
        plan = plan_tiles(hidden.shape[0], weight.shape[0], hidden.shape[1], ctx.workspace_mib)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        with _without_autocast(hidden):
            # A weight tile is the outer loop, so that its gradient is complete, in float32, before it is rounded.
            for v0, w_tile, b_tile in Head(weight, bias).tiles(plan.columns):
                w = w_tile.float()
                tile = slice(v0, v0 + w.shape[0])
                d_w = torch.zeros_like(w)
                for r0 in range(0, hidden.shape[0], plan.rows):
                    block = slice(r0, r0 + plan.rows)
                    h, c, t = hidden[block].float(), grad_logps[block], targets[block] - v0
                    logits, slope = _logits_tile(h, w, b_tile, head, temperature)
                    d_logits = logits.sub_(lse[block, None]).exp_().mul_(-c[:, None])
                    rows = ((t >= 0) & (t < w.shape[0])).nonzero()[:, 0]
                    d_logits[rows, t[rows]] += c[rows]
                    if slope is not None:
                        d_logits *= slope
                    d_logits *= head.logit_scale / temperature
                    torch.addmm(d_hidden[block], d_logits, w, out=d_hidden[block])
                    torch.addmm(d_w, d_logits.T, h, out=d_w)
                    if d_bias is not None:
                        d_bias[tile] += d_logits.sum(0)
                d_weight[tile] = d_w.to(weight.dtype)
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        return d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None, None


def linear_logps(
    hidden: Tensor,  # (N, H), any float dtype, any strides
    head: Head | Tensor,  # or its weight (V, H)
    targets: Tensor,  # (N,) int64
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    entropy: bool = False,
    workspace_mib: int = 64,
) -> LinearLogps:
    """Log-prob of `targets` under `softmax(softcap(scale * head(hidden)) / temperature)`, without N x V logits.

    Differentiable in `hidden`, and in the head's weight and bias where they require grad. `softcap` and `logit_scale`
    override those of a `Head`.

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, or a temperature that is not positive.
    """
    if isinstance(head, Tensor):
        head = Head(head)
    if softcap is not None or logit_scale is not None:
        scale = head.logit_scale if logit_scale is None else logit_scale
        head = Head(head.weight, head.bias, scale, head.softcap if softcap is None else softcap)
    vocab, width = head.weight.shape
    if hidden.ndim != 2 or hidden.shape[1] != width or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} do not fit a head of {(vocab, width)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if targets.numel() and not targets.is_cuda and not (int(targets.min()) >= 0 and int(targets.max()) < vocab):
        raise ValueError(f"a target lies outside the vocabulary of {vocab}")
    if head.trainable and torch.is_grad_enabled():
        logps, ent = _TrainableHead.apply(hidden, head.weight, head.bias, targets, head, temperature, workspace_mib)
    else:
        direction = torch.is_grad_enabled() and hidden.requires_grad
        logps, ent = _FrozenHead.apply(hidden, targets, head, temperature, workspace_mib, direction)
    return LinearLogps(logps, ent if entropy else None)


def linear_logps_ref(hidden: Tensor, head: Head, targets: Tensor, *, temperature: float = 1.0) -> LinearLogps:
    """The same with full logits, in the dtype of its inputs (use float64): the oracle of the tests."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    return LinearLogps(logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1))
