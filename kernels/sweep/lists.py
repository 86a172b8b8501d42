"""From the lists that a sweep has filled to the entries that its gradient needs.

The lists hold everything above a running threshold; now the log-sum-exp is final, and what is not above
lse + log(epsilon) is dropped. So the outcome does not depend on how the vocabulary was cut, and sums over a row are
made in the order of the vocabulary: the same bits every time.

The host waits for the device once: it must know how many entries each row keeps, for they become tensors of that
length. So which rows are diffuse is decided before, from sums of whole numbers, which are the same in whatever order
the fused kernel has filled the lists.

Memory: a byte a place of the lists while they are read, then about 40 bytes an entry that stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.sweep.direction import Entries
from lowvram_grpo.kernels.sweep.lists_triton import UNIT, filled, judged
from lowvram_grpo.kernels.sweep.state import D0, TARGET, D, E, M, RowState, S, X
from lowvram_grpo.kernels.transform import Transform
from torch import Tensor

_PLACE_BYTES = 16


class Told(NamedTuple):
    """What the host knows of R rows, without asking the device for more.

    Attributes:
        ends: (R + 1,) where each row's entries begin; as `Entries.offsets`.
        diffuse: how many rows are.
        overflowed: how many rows are because their list was too short.
        wanted: how many rows shall have a gradient.
    """

    ends: list[int]
    diffuse: int
    overflowed: int
    wanted: int


def _blocks(rows: int, size: int) -> Iterator[slice]:
    return (slice(r0, r0 + size) for r0 in range(0, rows, size))


def _judged(
    state: RowState, lse: Tensor, epsilon: float, max_tail: float, wanted: Tensor | None, scratch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """keep (R, capacity) bool: places above their row's threshold, none where a row overflowed or is not wanted; how
    many (R,); and which rows are diffuse (R,)."""
    overflowed = state.overflowed
    diffuse = overflowed if wanted is None else overflowed & wanted
    readable = ~overflowed if wanted is None else wanted & ~overflowed
    counted = torch.where(readable, state.count, 0)
    places = torch.arange(state.capacity, device=lse.device)
    keep = torch.empty(len(lse), state.capacity, dtype=torch.bool, device=lse.device)
    mass = torch.empty(len(lse), dtype=torch.long, device=lse.device)
    for block in _blocks(len(lse), max(1, scratch // (_PLACE_BYTES * state.capacity))):
        torch.lt(places, counted[block, None], out=keep[block])
        keep[block] &= state.logits[block] > (lse[block, None] + math.log(epsilon))
        share = (state.logits[block] - lse[block, None]).exp_().mul_(UNIT)
        # What lies beyond a list was never written.
        mass[block] = share.masked_fill_(~keep[block], 0.0).round_().long().sum(1)
    diffuse = diffuse | (readable & (mass < math.ceil((1 - max_tail) * UNIT)))
    return keep, keep.sum(1), diffuse


def _told(lengths: Tensor, alive: Tensor, diffuse: Tensor, overflowed: Tensor) -> Told:
    """By one copy, which waits."""
    return _told_of(torch.where(alive, lengths, torch.where(diffuse, torch.where(overflowed, -3, -2), -1)).tolist())


def _told_of(codes: list[int]) -> Told:
    """Of the codes that `lists_triton.judged` makes too."""
    # The target is an entry too.
    ends = list(accumulate((code + 1 if code >= 0 else 0 for code in codes), initial=0))
    return Told(ends, sum(code < -1 for code in codes), codes.count(-3), len(codes) - codes.count(-1))


def _places(keep: Tensor, ends: list[int], scratch: int) -> tuple[Tensor, Tensor]:
    """(rows, places) that are kept, row after row; a few rows at a time where there are more than `scratch` bytes can
    index."""
    step = max(1, -(-len(keep) // max(1, math.ceil(ends[-1] * 32 / scratch))))
    picked = []
    for block in _blocks(len(keep), step):
        own = ends[block.start : block.stop + 1]
        count = own[-1] - own[0] - sum(a < b for a, b in pairwise(own))
        rows, place = keep[block].nonzero_static(size=count).unbind(1)
        picked.append((rows + block.start, place))
    return picked[0] if len(picked) == 1 else tuple(map(torch.cat, zip(*picked)))


def entries_of(
    state: RowState,
    transform: Transform,
    *,
    epsilon: float,
    max_tail: float,
    wanted: Tensor | None,  # (R,) bool
    keep_kl: bool,
    keep_entropy: bool,
    shuffled: bool,
    vocab: int,
    scratch: int,
    kernels: bool = False,
) -> tuple[Entries, Tensor, Tensor, Told]:
    """Entries of R rows; (Rd,) int64 rows that are diffuse; the bound of the KL's missing sum (R,), empty without; and
    what the host was told.

    Rows that are diffuse or not wanted have no entries and no tail. `shuffled`: lists are not in vocabulary order.
    `kernels`: by those of `lists_triton.py`; this page is their reference, and a CPU's way.
    """
    if kernels:
        return _by_kernels(
            state, transform, epsilon, max_tail, wanted, keep_kl=keep_kl, keep_entropy=keep_entropy, shuffled=shuffled
        )
    stats = state.stats
    lse = stats[M] + stats[S].log()
    keep, lengths, diffuse = _judged(state, lse, epsilon, max_tail, wanted, scratch)
    alive = ~diffuse if wanted is None else wanted & ~diffuse
    told = _told(lengths, alive, diffuse, state.overflowed)
    lengths = torch.where(alive, lengths, 0)
    keep &= alive[:, None]
    rows, place = _places(keep, told.ends, scratch)
    ids = state.ids[rows, place]
    if shuffled:
        order = (rows * vocab + ids).argsort()
        rows, place, ids = rows[order], place[order], ids[order]
    logits = state.logits[rows, place]
    coef = (logits - lse[rows]).exp()
    # `unsafe`: not asked whether the lengths fit, which would be a wait.
    total = lambda values: torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)
    tail = torch.where(alive, (1 - total(coef)).clamp(min=0), 0.0)
    kl_coef, kl_tail, spread, entropy_coef, entropy_tail = (tail.new_empty(0) for _ in range(5))
    if keep_kl:
        mean = stats[D] / stats[S]
        gap = logits - state.ref_logits[rows, place] - (stats[D0] + mean)[rows]
        kl_coef = coef * gap
        variance = stats[E] / stats[S] - mean.square()
        spread = (tail * (variance - total(kl_coef * gap)).clamp(min=0)).sqrt()
        kl_tail = torch.where(alive, -total(kl_coef), 0.0)
    if keep_entropy:
        entropy_coef = coef * ((stats[M] + stats[X] / stats[S])[rows] - logits)
        entropy_tail = torch.where(alive, -total(entropy_coef), 0.0)
    slope, target_slope = transform.slope(logits), transform.slope(stats[TARGET])
    if slope is not None:
        coef = coef * slope
        kl_coef = kl_coef * slope if keep_kl else kl_coef
        entropy_coef = entropy_coef * slope if keep_entropy else entropy_coef
    # The target is one more entry, of coefficient -1, first in its row; the others move up by the targets so far.
    offsets = torch.nn.functional.pad((torch.where(alive, lengths + 1, 0)).cumsum(0), (1, 0))
    owners = alive.nonzero_static(size=told.wanted - told.diffuse)[:, 0]
    moved = torch.arange(len(rows), device=rows.device) + alive.cumsum(0)[rows]

    def join(first: Tensor, rest: Tensor) -> Tensor:
        joined = rest.new_empty(len(first) + len(rest))
        joined[offsets[owners]], joined[moved] = first, rest
        return joined

    beside = lambda rest, kept: join(rest.new_zeros(len(owners)), rest) if kept else rest
    minus_one = -torch.ones_like(tail) if target_slope is None else -target_slope
    entries = Entries(
        offsets,
        join(state.targets[owners].int(), ids),
        join(minus_one[owners], coef),
        beside(kl_coef, keep_kl),
        beside(entropy_coef, keep_entropy),
        tail,
        kl_tail,
        entropy_tail,
    )
    return entries, diffuse.nonzero_static(size=told.diffuse)[:, 0], spread, told


def _by_kernels(
    state: RowState, transform: Transform, epsilon: float, max_tail: float, wanted: Tensor | None, **kept: bool
) -> tuple[Entries, Tensor, Tensor, Told]:
    code = judged(state, epsilon, max_tail, wanted)
    told = _told_of(code.tolist())
    *found, spread = filled(state, transform, code, told.ends[-1], epsilon, **kept)
    return Entries(*found), (code < -1).nonzero_static(size=told.diffuse)[:, 0], spread, told
