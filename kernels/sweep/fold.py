"""Fold one tile of raw logits x = W h into the running statistics of its rows.

With l = softcap * tanh(scale * (x + b) / softcap) / T (no tanh without soft-capping) and the running maximum m:

    S = sum e^(l-m)      X = sum e^(l-m) (l-m)                               -> lse = m + log S, entropy = log S - X/S
    with reference logits r, d = l - r - d0, d0 any constant of the row:
    D = sum e^(l-m) d    E = sum e^(l-m) d^2                                 -> KL = D/S + d0 - lse + lse_r

each an online sum (Milakov & Gimelshein 2018, arXiv:1805.02867): a new maximum rescales what was summed before. Entries
above the running log-sum-exp + log(epsilon) are appended to the row's list: always a superset of those above the final
one, since a log-sum-exp only grows. The maximum starts near the target's own logit, so the list is nearly minimal from
the first tile on. For the dense direction the tile's probabilities e^(l-m), and e^(l-m) d and e^(l-m) (l-l0) with l0
any constant of the row, are written out instead.

Memory: 10 floats and one list a row. This is the CPU's path, and the reference of `fold_triton.py` and `fused_fold.py`.
"""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.sweep.state import (
    D0,
    REF_M,
    REF_S,
    REF_TARGET,
    TARGET,
    D,
    E,
    M,
    Probabilities,
    RowState,
    S,
    X,
)
from lowvram_grpo.kernels.transform import LOWEST, Transform
from torch import Tensor


def fold_torch(
    state: RowState,
    x: Tensor,  # (R, C) float32, overwritten
    ref_x: Tensor | None,  # (R, C) float32, overwritten
    bias: Tensor | None,  # (C,)
    v0: int,
    transform: Transform,
    log_epsilon: float,
    out: Probabilities | None = None,
) -> None:
    """The fold in PyTorch."""
    stats, columns = state.stats, x.shape[1]
    if bias is not None:
        x += bias.float()
        if ref_x is not None:
            ref_x += bias.float()
    logits = transform(x)
    slope = transform.slope(logits) if out is not None else None
    here = (state.targets >= v0) & (state.targets < v0 + columns)
    at = (state.targets - v0).clamp(0, columns - 1)[:, None]
    stats[TARGET] = torch.where(here, logits.gather(1, at)[:, 0], stats[TARGET])
    before = stats[M].clone()
    highest = logits.amax(1)
    m = torch.maximum(before, highest)
    decay = (before - m).exp()
    d = None
    if ref_x is not None:
        ref = transform(ref_x)
        stats[REF_TARGET] = torch.where(here, ref.gather(1, at)[:, 0], stats[REF_TARGET])
        ref_m = torch.maximum(stats[REF_M], ref.amax(1))
        stats[REF_S] = stats[REF_S] * (stats[REF_M] - ref_m).exp() + (ref - ref_m[:, None]).exp().sum(1)
        stats[REF_M] = ref_m
        d = (logits - ref).sub_(stats[D0][:, None])
    shifted = logits.sub_(m[:, None])
    p = shifted.exp()
    if bias is not None:
        # An entry of logit -inf has p = 0 and must not add 0 * inf.
        shifted.clamp_(min=LOWEST)
    stats[X] = decay * (stats[X] + stats[S] * (before - m)) + torch.linalg.vecdot(p, shifted)
    stats[S] = decay * stats[S] + p.sum(1)
    stats[M] = m
    if d is not None:
        d = torch.where(p > 0, d, 0.0)
        stats[D] = decay * stats[D] + torch.linalg.vecdot(p, d)
        stats[E] = decay * stats[E] + torch.linalg.vecdot(p, d.square())
    if state.capacity:
        _append(state, shifted, highest - m, d, v0, log_epsilon)
    if out is not None:
        out.decay.copy_(decay)
        out.p.copy_(p if slope is None else p.mul_(slope))
        if out.pd is not None:
            out.pd.copy_(d.mul_(p))
        if out.pl is not None:
            out.pl.copy_(shifted.add_((m - out.l0)[:, None]).mul_(p))


def _append(state: RowState, shifted: Tensor, highest: Tensor, d: Tensor | None, v0: int, log_epsilon: float) -> None:
    """Put the entries above the threshold on the lists, in the order of the vocabulary. highest (R,): of `shifted`."""
    stats = state.stats
    threshold = stats[S].log().clamp(min=0) + log_epsilon
    hit = ((highest > threshold) & ~state.overflowed).nonzero()[:, 0]
    if 2 * len(hit) > len(shifted):  # copying so many rows would cost more than looking at the others
        hit = torch.arange(len(shifted), device=shifted.device)
        keep = shifted > threshold[:, None]
    else:
        keep = shifted[hit] > threshold[hit, None]
    kept = keep.sum(1, dtype=torch.int32)
    start = state.count[hit]
    state.count[hit] += kept
    full = state.overflowed[hit]
    if full.any():
        keep &= ~full[:, None]
        kept = torch.where(full, 0, kept)
    at, columns = keep.nonzero().unbind(1)
    rank = torch.arange(len(at), device=at.device) - (kept.cumsum(0) - kept)[at]
    rows = hit[at]
    place = (rows, start[at] + rank)
    state.ids[place] = (columns + v0).int()
    logits = shifted[rows, columns] + stats[M][rows]
    state.logits[place] = logits
    if d is not None:
        state.ref_logits[place] = logits - d[rows, columns] - stats[D0][rows]
