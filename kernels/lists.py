"""From the lists that a sweep has filled to the entries that its gradient needs.

The lists hold everything above a running threshold; now the log-sum-exp is final, and what is not above
lse + log(epsilon) is dropped. So the outcome does not depend on how the vocabulary was cut, and sums over a row are
made in the order of the vocabulary: the same bits every time.

Memory: a byte a place of the lists while they are read, then about 40 bytes an entry that stays.
"""

from __future__ import annotations

import math

import torch
from lowvram_grpo.kernels.direction import Entries
from lowvram_grpo.kernels.fold import D0, TARGET, D, E, M, RowState, S, Transform
from torch import Tensor


def _pick(state: RowState, threshold: Tensor, wanted: Tensor | None, scratch: int) -> tuple[Tensor, Tensor]:
    """(rows, places) of the entries above their row's threshold, row after row, rows that overflowed left out; a few
    rows at a time where there are more entries than `scratch` bytes can index."""
    readable = ~state.overflowed if wanted is None else wanted & ~state.overflowed
    counted = torch.where(readable, state.count, 0)
    parts = max(1, math.ceil(int(counted.sum()) * 32 / scratch))
    step = max(1, -(-len(counted) // parts))
    places = torch.arange(state.capacity, device=counted.device)
    picked = []
    for r0 in range(0, len(counted), step):
        block = slice(r0, r0 + step)
        keep = (places < counted[block, None]) & (state.logits[block] > threshold[block, None])
        rows, place = keep.nonzero().unbind(1)
        picked.append((rows + r0, place))
    if not picked:
        return places[:0], places[:0]
    return picked[0] if len(picked) == 1 else tuple(map(torch.cat, zip(*picked)))


def entries_of(
    state: RowState,
    transform: Transform,
    *,
    epsilon: float,
    max_tail: float,
    wanted: Tensor | None,  # (R,) bool
    keep_kl: bool,
    shuffled: bool,
    vocab: int,
    scratch: int,
) -> tuple[Entries, Tensor, Tensor]:
    """Entries of R rows; which rows are diffuse (R,) bool; and the bound of the KL's missing sum (R,), empty without.

    Rows that are diffuse or not wanted have no entries and no tail. `shuffled`: lists are not in vocabulary order.
    """
    stats = state.stats
    lse = stats[M] + stats[S].log()
    rows, place = _pick(state, lse + math.log(epsilon), wanted, scratch)
    ids = state.ids[rows, place]
    if shuffled:
        order = (rows * vocab + ids).argsort()
        rows, place, ids = rows[order], place[order], ids[order]
    logits = state.logits[rows, place]
    coef = (logits - lse[rows]).exp()
    lengths = torch.bincount(rows, minlength=len(lse))
    total = lambda values: torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0)
    tail = (1 - total(coef)).clamp(min=0)
    diffuse = state.overflowed | (tail > max_tail)
    if wanted is not None:
        diffuse &= wanted
    alive = ~diffuse if wanted is None else wanted & ~diffuse
    tail = torch.where(alive, tail, 0.0)
    kl_coef, kl_tail, spread = (tail.new_empty(0) for _ in range(3))
    if keep_kl:
        mean = stats[D] / stats[S]
        gap = logits - state.ref_logits[rows, place] - (stats[D0] + mean)[rows]
        kl_coef = coef * gap
        variance = stats[E] / stats[S] - mean.square()
        spread = (tail * (variance - total(kl_coef * gap)).clamp(min=0)).sqrt()
        kl_tail = torch.where(alive, -total(kl_coef), 0.0)
    slope, target_slope = transform.slope(logits), transform.slope(stats[TARGET])
    if slope is not None:
        coef = coef * slope
        kl_coef = kl_coef * slope if keep_kl else kl_coef
    stays = alive[rows].nonzero()[:, 0]
    rows, ids, coef = rows[stays], ids[stays], coef[stays]
    kl_coef = kl_coef[stays] if keep_kl else kl_coef
    # The target is one more entry, of coefficient -1, first in its row; the others move up by the targets so far.
    offsets = torch.nn.functional.pad((torch.where(alive, lengths + 1, 0)).cumsum(0), (1, 0))
    owners = alive.nonzero()[:, 0]
    moved = torch.arange(len(rows), device=rows.device) + alive.cumsum(0)[rows]

    def join(first: Tensor, rest: Tensor) -> Tensor:
        joined = rest.new_empty(len(first) + len(rest))
        joined[offsets[owners]], joined[moved] = first, rest
        return joined

    minus_one = -torch.ones_like(tail) if target_slope is None else -target_slope
    entries = Entries(
        offsets,
        join(state.targets[owners].int(), ids),
        join(minus_one[owners], coef),
        join(coef.new_zeros(len(owners)), kl_coef) if keep_kl else kl_coef,
        tail,
        kl_tail,
    )
    return entries, diffuse, spread
