"""One pass over the vocabulary: statistics of all rows, and what their gradient will need.

A row is `listed` (its probable entries, 2NVH FLOP in all, see `direction.py`) or `diffuse`: its list overflowed, or
more mass than `max_tail` is missing from it. Diffuse rows are swept again, together, with the dense online product
sum_v p_v W_v (FlashAttention with K = V = W, Dao et al. 2022; 4NVH FLOP, 2NVH more for the gradient of the KL and for
that of the entropy each). Where most rows of a block turn out diffuse on its first tile already, the block and all that
follow take the dense product at once.

Memory: the workspace holds the tiles of one row block; what outlives the sweep is about 30 entries of 8 bytes for a
listed row and H floats for a diffuse one. The gradients of KL and entropy take 4 bytes an entry, or H floats, each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.sweep.direction import Entries
from lowvram_grpo.kernels.sweep.launch import LaunchConfig
from lowvram_grpo.kernels.sweep.lists import entries_of
from lowvram_grpo.kernels.sweep.plan import DirectionParams
from lowvram_grpo.kernels.sweep.state import D0, REF_M, REF_S, REF_TARGET, TARGET, D, M, RowState, S, X
from lowvram_grpo.kernels.sweep.vocabulary_pass import UNKNOWN, Centres, Directions, VocabularyPass
from lowvram_grpo.kernels.transform import Transform
from torch import Tensor


class Swept(NamedTuple):
    """Outcome for N rows; what was not asked for is empty.

    Attributes:
        logps, entropy, ref_logps, kl: (N,) float32.
        entries: lists; rows without one have no entries.
        diffuse: (Nd,) int64 rows that took the dense product.
        g, g_kl, g_entropy: (Nd, H) float32, d logp / d hidden, d KL / d hidden and d entropy / d hidden of those rows.
        kl_spread: (N,) float32, bound of the listed KL's missing sum |p (d - E[d])|.
        lse: (N,) float32 log-sum-exp of the logits.
        ends: (N + 1,) the offsets of the entries, as the host knows them.
    """

    logps: Tensor
    entropy: Tensor
    ref_logps: Tensor
    kl: Tensor
    entries: Entries
    diffuse: Tensor
    g: Tensor
    g_kl: Tensor
    g_entropy: Tensor
    kl_spread: Tensor
    lse: Tensor
    ends: list[int]


def sweep(
    hidden: Tensor,  # (N, H)
    ref_hidden: Tensor | None,  # (N, H)
    head: Head,
    targets: Tensor,  # (N,) int64
    wanted: Tensor | None,  # (N,) bool: rows that need a gradient
    *,
    temperature: float,
    params: DirectionParams,
    launch: LaunchConfig,
    dtype: torch.dtype,
    workspace_mib: int,
    want_grad: bool,
    want_kl_grad: bool,
    entropy_gradient: bool,
) -> Swept:
    """The whole pass; see the module. Products are made in `dtype` and accumulated in float32.

    `entropy_gradient` without `want_grad` only cuts the tiles as the pass with both does.
    """
    n, device, has_ref = len(hidden), hidden.device, ref_hidden is not None
    transform = Transform(head.logit_scale, head.softcap, temperature)
    over = VocabularyPass(
        head, transform, n, dtype, device, has_ref, workspace_mib, params, launch, want_grad, entropy_gradient
    )
    want = _Want(want_grad, want_kl_grad, want_grad and entropy_gradient)
    column = lambda present=True: torch.empty(n if present else 0, device=device)
    logps, entropy, ref_logps, kl = column(), column(), column(has_ref), column(has_ref)
    spread, lse = column(want_kl_grad).zero_(), column()
    blocks = _Blocks(over, n, None if device.type == "meta" else wanted, want, workspace_mib * 2**17)
    for first in range(0, n, over.plan.rows):
        rows = slice(first, min(first + over.plan.rows, n))
        stats = blocks.take(
            _Block(
                first,
                hidden[rows].to(dtype).contiguous(),
                ref_hidden[rows].to(dtype).contiguous() if has_ref else None,
                targets[rows],
                None if blocks.wanted is None else blocks.wanted[rows],
            ),
            spread[rows],
        )
        log_s = stats[S].log()
        lse[rows] = stats[M] + log_s
        logps[rows] = stats[TARGET] - lse[rows]
        entropy[rows] = log_s - stats[X] / stats[S]
        if has_ref:
            ref_lse = stats[REF_M] + stats[REF_S].log()
            ref_logps[rows] = stats[REF_TARGET] - ref_lse
            kl[rows] = stats[D] / stats[S] + stats[D0] - lse[rows] + ref_lse
    return Swept(
        logps, entropy, ref_logps, kl, _join(blocks.entries, device, want), blocks.diffuse_rows(),
        blocks.g.all(), blocks.g_kl.all(), blocks.g_entropy.all(), spread, lse, blocks.ends,
    )  # fmt: skip


class _Want(NamedTuple):
    """Whether rows need a gradient, and whether one goes through the KL and the entropy too."""

    grad: bool
    kl: bool
    entropy: bool


@dataclass(frozen=True)
class _Block:
    """R rows of the sweep from row `first` on.

    Attributes:
        hidden, ref_hidden: (R, H) in the dtype of the products.
        targets: (R,) int64.
        wanted: (R,) bool.
    """

    first: int
    hidden: Tensor
    ref_hidden: Tensor | None
    targets: Tensor
    wanted: Tensor | None

    def __len__(self) -> int:
        return len(self.targets)

    def some(self, rows: Tensor | slice) -> tuple[Tensor, Tensor | None, Tensor]:
        """Hidden states, those of the reference, and targets."""
        return self.hidden[rows], None if self.ref_hidden is None else self.ref_hidden[rows], self.targets[rows]


class _Blocks:
    """Listed and diffuse rows, block by block: how one went says how the next is begun with."""

    def __init__(self, over: VocabularyPass, n: int, wanted: Tensor | None, want: _Want, scratch: int):
        self.over, self.n, self.wanted, self.want, self.scratch = over, n, wanted, want, scratch
        self.g, self.g_kl, self.g_entropy = (_Rows(over.width, over.device) for _ in range(3))
        self.entries: list[Entries] = []
        self.ends = [0]
        self._diffuse: list[Tensor] = []
        self._needed = _Needed(wanted, over.plan.rows)
        self._all_dense = want.grad and not over.lists
        self._may_give_up = over.lists and over.params.mode == "auto"

    def take(self, block: _Block, spread: Tensor) -> Tensor:
        """The statistics of a block; its entries, diffuse rows and directions are kept here, the bound of the KL's
        missing sum is written to `spread`."""
        # Only the first block is asked early; how it ended says what to expect of the others.
        hopeless = self._needed.most_overflow if self._may_give_up and block.first == 0 else None
        state = None
        if not self._all_dense:
            state = self.over.listed(*block.some(slice(None)), self.over.lists, hopeless)
        if state is not None and self.want.grad:
            self._list(block, state, spread)
            return state.stats
        if state is None:
            self._all_dense = True
            stats = self._dense_block(block)
        else:
            stats = state.stats
        self.entries.append(_no_entries(len(block), self.over.device, self.want))
        self.ends += [self.ends[-1]] * len(block)
        return stats

    def diffuse_rows(self) -> Tensor:
        """(Nd,) int64."""
        return torch.cat(self._diffuse) if self._diffuse else torch.empty(0, dtype=torch.long, device=self.over.device)

    def _list(self, block: _Block, state: RowState, spread: Tensor) -> None:
        stats, over = state.stats, self.over
        entries, rows, block_spread, told = entries_of(
            state, over.transform, epsilon=over.params.epsilon, max_tail=over.params.max_tail, wanted=block.wanted,
            keep_kl=self.want.kl, keep_entropy=self.want.entropy, shuffled=over.launch.path == "fused",
            vocab=over.vocab, scratch=self.scratch, kernels=stats.is_cuda and over.launch.path != "torch",
        )  # fmt: skip
        self._all_dense = self._may_give_up and 2 * told.overflowed > told.wanted
        self.ends += [self.ends[-1] + end for end in told.ends[1:]]
        if self.want.kl:
            spread.copy_(block_spread)
        if len(rows):
            log_ratio = None if block.ref_hidden is None else (stats[D0] + stats[D] / stats[S])[rows]
            logit = (stats[M] + stats[X] / stats[S])[rows] if self.want.entropy else None
            self._dense(block, rows, len(rows), len(rows), Centres(log_ratio, logit), wide=True)
        self.entries.append(entries)

    def _dense_block(self, block: _Block) -> Tensor:
        """Statistics of a block none of whose rows is listed."""
        count = len(block) if block.wanted is None else self._needed.count(block.first // self.over.plan.rows)
        if count == len(block):  # without copies
            return self._dense(block, slice(None), count, self.n - block.first)
        some = block.wanted.nonzero_static(size=count)[:, 0]
        others = (~block.wanted).nonzero_static(size=len(block) - count)[:, 0]
        stats = torch.empty(4 if block.ref_hidden is None else 10, len(block), device=self.over.device)
        if len(some):
            stats[:, some] = self._dense(block, some, count, count)
        if len(others):
            stats[:, others] = self.over.listed(*block.some(others), False).stats
        return stats

    def _dense(
        self, block: _Block, rows: Tensor | slice, count: int, reserve: int, centres: Centres = UNKNOWN, *,
        wide: bool = False,
    ) -> Tensor:  # fmt: skip
        """Statistics of `count` rows of a block, whose directions are kept; `reserve`: how many may still come."""
        kept = zip((self.g, self.g_kl, self.g_entropy), self.want)
        into = Directions(*(kind.take(count, reserve) if wanted else None for kind, wanted in kept))
        self._diffuse.append(torch.arange(block.first, block.first + len(block), device=self.over.device)[rows])
        return self.over.dense(*block.some(rows), into, centres, wide=wide).stats


class _Rows:
    """Collects (rows, H) results of row blocks whose number is not known in advance, without holding them twice where
    it is: once a block is wholly dense, so are all that follow."""

    def __init__(self, width: int, device: torch.device):
        self.width, self.device = width, device
        self.parts: list[Tensor] = []
        self.used = 0

    def take(self, rows: int, reserve: int) -> Tensor:
        """An uninitialized (rows, H) piece; `reserve`: how many rows may still come, itself included."""
        if not self.parts or self.used + rows > len(self.parts[-1]):
            self.close()
            self.parts.append(torch.empty(reserve, self.width, device=self.device))
            self.used = 0
        piece = self.parts[-1][self.used : self.used + rows]
        self.used += rows
        return piece

    def close(self) -> None:
        if self.parts:
            self.parts[-1] = self.parts[-1][: self.used]

    def all(self) -> Tensor:
        self.close()
        if not self.parts:
            return torch.empty(0, self.width, device=self.device)
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


class _Needed:
    """How many rows of each block need a gradient: asked once at most, together with what else is asked then."""

    def __init__(self, wanted: Tensor | None, rows: int):
        self._wanted, self._rows = wanted, rows
        self._counts: list[int] | None = None

    def _ask(self, *questions: Tensor) -> list[int]:
        sums = [] if self._wanted is None else [part.sum() for part in self._wanted.split(self._rows)]
        (*answers,) = torch.stack([*questions, *sums]).tolist()
        self._counts = answers[len(questions) :]
        return answers[: len(questions)]

    def count(self, block: int) -> int:
        if self._counts is None:
            self._ask()
        return self._counts[block]

    def most_overflow(self, overflowed: Tensor) -> bool:
        """Of the first block: most of its rows that need a gradient."""
        if self._wanted is not None:
            overflowed = overflowed & self._wanted[: self._rows]
        (count,) = self._ask(overflowed.sum())
        return 2 * count > (len(overflowed) if self._wanted is None else self._counts[0])


def _no_entries(rows: int, device: torch.device, want: _Want) -> Entries:
    # Tensors of their own each: outputs of an operator must not alias each other.
    empty = lambda n=0, of=torch.float32: torch.zeros(n, dtype=of, device=device)
    tails = (empty(rows if needed else 0) for needed in (True, want.kl, want.entropy))
    return Entries(empty(rows + 1, torch.long), empty(0, torch.int32), empty(), empty(), empty(), *tails)


def _join(lists: list[Entries], device: torch.device, want: _Want) -> Entries:
    if not lists:
        return _no_entries(0, device, want)
    if len(lists) == 1:
        return lists[0]
    counts = torch.cat([part.offsets.diff() for part in lists])
    joined = Entries(*(torch.cat(column) for column in zip(*lists)))
    return joined._replace(offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
