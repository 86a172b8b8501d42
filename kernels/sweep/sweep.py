"""One pass over the vocabulary: statistics of all rows, and what their gradient will need.

A row is `listed` (its probable entries, 2NVH FLOP in all, see `direction.py`) or `diffuse`: its list overflowed, or
more mass than `max_tail` is missing from it. Diffuse rows are swept again, together, with the dense online product
sum_v p_v W_v (FlashAttention with K = V = W, Dao et al. 2022; 4NVH FLOP). Where most rows of a block turn out diffuse
on its first tile already, the block and all that follow take the dense product at once.

Memory: the workspace holds the tiles of one row block; what outlives the sweep is about 30 entries of 8 bytes for a
listed row and H floats for a diffuse one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, starmap
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.cuts import cuts
from lowvram_grpo.kernels.sweep.direction import Entries
from lowvram_grpo.kernels.sweep.fold import (
    D0,
    REF_M,
    REF_S,
    REF_TARGET,
    TARGET,
    D,
    M,
    Probabilities,
    RowState,
    S,
    Transform,
    X,
    fold_torch,
    fold_triton,
)
from lowvram_grpo.kernels.sweep.fused_fold import fused_fold
from lowvram_grpo.kernels.sweep.launch import LaunchConfig
from lowvram_grpo.kernels.sweep.lists import entries_of
from torch import Tensor

from lowvram_grpo.errors import is_out_of_memory
from lowvram_grpo.policy.head import Head

MODES = ("auto", "sparse", "dense")
_MAX_ROWS = 2048
# On a CPU, making lists costs more than the product they save where hidden states are narrow: 2.5 times the dense
# sweep's time at H = 576 (SmolLM2-135M), 0.63 times at H = 896 (Qwen2.5-Coder-0.5B); docs/LOG.md, 2026-11-21.
_CPU_LISTS_FROM_WIDTH = 768


@dataclass(frozen=True)
class DirectionParams:
    """How the gradient direction is found.

    Attributes:
        mode: `sparse` lists for every row that they can serve, `dense` the full product, `auto` decides by block.
        epsilon: smallest probability that is listed.
        capacity: entries that a list can hold; rows with more are diffuse.
        max_tail: probability that may be missing from a list; rows with more are diffuse. On hidden states of
            Qwen2.5-Coder-0.5B and SmolLM2-135M these defaults keep the direction's error under a quarter of what
            rounding the logits to bfloat16 costs.
    """

    mode: str = "auto"
    epsilon: float = 2.0**-16
    capacity: int = 1024
    max_tail: float = 0.012

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"direction {self.mode!r} is not one of {', '.join(MODES)}")


class TilePlan(NamedTuple):
    """How a sweep is cut: `rows` hidden states by `columns` vocabulary entries at a time."""

    rows: int
    columns: int


class Swept(NamedTuple):
    """Outcome for N rows; what was not asked for is empty.

    Attributes:
        logps, entropy, ref_logps, kl: (N,) float32.
        entries: lists; rows without one have no entries.
        diffuse: (Nd,) int64 rows that took the dense product.
        g, g_kl: (Nd, H) float32, d logp / d hidden and d KL / d hidden of those rows.
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
    kl_spread: Tensor
    lse: Tensor
    ends: list[int]


def plan_tiles(
    n: int, vocab: int, width: int, workspace_mib: int, *, item: int = 4, view: bool = False, tile_bytes: int = 16,
    row_bytes: int | None = None,
) -> TilePlan:  # fmt: skip
    """Cut (n, vocab) so that one row block and one tile take 7/8 of the workspace; the rest is for small change.

    Args:
        item: bytes of the matmul's dtype.
        view: the weight tile needs no buffer.
        tile_bytes: all that is held for one row and column.
        row_bytes: all that is held for one row; its hidden state if left out.
    """
    budget = workspace_mib * 2**20 * 7 // 8
    row_bytes = row_bytes or width * item
    rows = max(1, min(n, _MAX_ROWS, budget // (2 * row_bytes)))
    columns = (budget - rows * row_bytes) // (tile_bytes * rows + (0 if view else width * item))
    # Leading dimensions that are not multiples of 16 bytes cost cuBLAS its fast kernels.
    columns -= columns % 128 if columns > 128 else 0
    return TilePlan(rows, max(1, min(vocab, columns)))


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast would quietly turn the float32 products of the sweep into bfloat16 ones."""
    device = tensor.device.type
    return torch.autocast(device if device != "meta" else "cpu", enabled=False)


@cache
def _accumulates(device: torch.device) -> bool:
    """Whether 16-bit products can be added to a float32 tensor in one call; torch 2.9 refuses (pytorch #167931)."""
    half, total = torch.zeros(8, 8, dtype=torch.float16, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, half, half, torch.float32, out=total)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into float32 `out`, accumulated in float32 whatever a and b are."""
    if out.is_meta:
        return out
    if out.is_cuda and a.dtype != torch.float32:
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, in float32."""
    if total.is_meta:
        return total
    if total.is_cuda and a.dtype != torch.float32:
        if not _accumulates(total.device):
            return total.add_(torch.ops.aten.mm.dtype(a, b, torch.float32))
        return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    return torch.addmm(total, a.float(), b.float(), out=total)


class Sweeper:
    """The pass over the vocabulary for one head, transform and device; buffers are shared by all row blocks."""

    def __init__(
        self, head: Head, transform: Transform, n: int, dtype: torch.dtype, device: torch.device, has_ref: bool,
        workspace_mib: int, params: DirectionParams, launch: LaunchConfig, want_grad: bool,
    ):  # fmt: skip
        self.head, self.transform, self.params, self.launch = head, transform, params, launch
        self.vocab, self.width = head.shape
        self.dtype, self.device = dtype, device
        narrow = params.mode == "auto" and device.type == "cpu" and launch.path == "torch"
        narrow = narrow and self.width < _CPU_LISTS_FROM_WIDTH
        self.lists = want_grad and params.mode != "dense" and device.type != "meta" and not narrow
        self.view = head.is_view(dtype, device)
        item = torch.empty(0, dtype=dtype).element_size()
        refs = 1 + has_ref
        # Logits, and their probabilities for the dense product; PyTorch's fold needs copies of its own. The plan is the
        # same with and without a gradient: scoring twice gives the same bits.
        tile_bytes = refs * (4 + item) + (8 * refs + 4 if launch.path == "torch" else 0)
        list_bytes = (10 + 4 * has_ref) * params.capacity if params.mode != "dense" else 0
        self.plan = plan_tiles(
            n, self.vocab, self.width, workspace_mib, item=item, view=self.view, tile_bytes=tile_bytes,
            row_bytes=refs * self.width * item + list_bytes,
        )  # fmt: skip
        # Rows of float32 weights that fit into the small change.
        self._step = max(1, workspace_mib * 2**20 // 16 // (4 * self.width))
        self.weights = torch.empty(0 if self.view else self.plan.columns, self.width, dtype=dtype, device=device)
        # Made when first used: the fused kernel needs no tile but for diffuse rows.
        self._tiles: dict[str, Tensor] = {}
        self._decay = torch.empty(self.plan.rows, device=device)
        self.log_epsilon = math.log(params.epsilon)

    def edges(self) -> list[int]:
        """Where tiles begin; the fused kernel takes what lies on the device in two launches, the first a probe."""
        if self.launch.path == "fused" and self.view:
            return [0, min(4096, self.vocab), self.vocab] if self.vocab > 4096 else [0, self.vocab]
        tiles = cuts(self.vocab, self.plan.columns, self.device)
        return [0, *(end for _, end in tiles)]

    def start(self, h: Tensor, ref_h: Tensor | None, targets: Tensor, lists: bool) -> RowState:
        hint = torch.empty(len(h), device=self.device)
        ref_hint = None if ref_h is None else torch.empty_like(hint)
        for block in starmap(slice, cuts(len(h), self._step, self.device)):
            w = self.head.rows(targets[block], self.dtype)
            bias = 0.0 if self.head.bias is None else self.head.bias.detach().to(self.device)[targets[block]].float()
            for x, into in ((h, hint), (ref_h, ref_hint)):
                if x is not None:
                    into[block] = self.transform(torch.bmm(x[block, None], w[..., None]).flatten().float() + bias)
        # A 16-bit product may be a little above the logit, and the hint must not be above the log-sum-exp.
        slack = 2**-7 if self.dtype != torch.float32 else 2**-20
        return RowState.start(targets, hint, ref_hint, self.params.capacity if lists else 0, slack)

    def _tile(self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous (rows, columns) piece of the buffer of that name."""
        if name not in self._tiles:
            self._tiles[name] = torch.empty(self.plan.rows * self.plan.columns, dtype=dtype, device=self.device)
        return self._tiles[name][: rows * columns].view(rows, columns)

    def fold(
        self, state: RowState, h: Tensor, ref_h: Tensor | None, v0: int, v1: int, out: Probabilities | None = None
    ):
        """Multiply and fold vocabulary entries v0 to v1; returns their weights (v1 - v0, H)."""
        w, bias = self.head.tile(v0, v1, self.weights)
        if self.launch.path == "fused" and out is None:
            fused_fold(state, h, ref_h, w, bias, v0, self.transform, self.log_epsilon, self.launch.fused)
            return w
        x = matmul(h, w.T, self._tile("x", len(h), v1 - v0))
        ref_x = None if ref_h is None else matmul(ref_h, w.T, self._tile("ref x", len(h), v1 - v0))
        fold = fold_torch if self.launch.path == "torch" else fold_triton
        fold(state, x, ref_x, bias, v0, self.transform, self.log_epsilon, out)
        return w

    def listed(
        self, h: Tensor, ref_h: Tensor | None, targets: Tensor, lists: bool,
        hopeless: Callable[[Tensor], bool] | None = None,
    ) -> RowState | None:  # fmt: skip
        """The state after one pass; None if `hopeless` says so after the first tile, asked with the rows whose lists
        have overflowed already."""
        state = self.start(h, ref_h, targets, lists)
        for i, (v0, v1) in enumerate(pairwise(self.edges())):
            self.fold(state, h, ref_h, v0, v1)
            if i == 0 and hopeless is not None and v1 < self.vocab and hopeless(state.overflowed):
                return None
        return state

    def dense(
        self, h: Tensor, ref_h: Tensor | None, targets: Tensor, g: Tensor, g_kl: Tensor | None,
        centre: Tensor | None = None,
    ) -> RowState:  # fmt: skip
        """The state after one pass, and d logp / d h into `g` (r, H), d KL / d h into `g_kl`.

        centre (r,): E[l - r] where it is known. Log-ratios are rounded to the matmul's dtype, so what is subtracted
        from them afterwards should be small.
        """
        state = self.start(h, ref_h, targets, False)
        if centre is not None:
            state.stats[D0] = centre
        g.zero_()
        if g_kl is not None:
            g_kl.zero_()
        for v0, v1 in cuts(self.vocab, self.plan.columns, self.device):
            shape = len(h), v1 - v0
            pd = None if g_kl is None else self._tile("pd", *shape, self.dtype)
            out = Probabilities(self._tile("p", *shape, self.dtype), pd, self._decay[: len(h)])
            w = self.fold(state, h, ref_h, v0, v1, out)
            add_matmul(g.mul_(out.decay[:, None]), out.p, w)
            if g_kl is not None:
                add_matmul(g_kl.mul_(out.decay[:, None]), out.pd, w)
        mass = state.stats[S][:, None]
        g.div_(mass)
        factor = self.transform.scale / self.transform.temperature
        if g_kl is not None:
            g_kl.div_(mass).addcmul_(g, (state.stats[D] / state.stats[S])[:, None], value=-1).mul_(factor)
        slope = self.transform.slope(state.stats[TARGET])
        for block in starmap(slice, cuts(len(h), self._step, self.device)):
            w = self.head.rows(targets[block], self.dtype).float()
            if slope is not None:
                w *= slope[block, None]
            g[block].neg_().add_(w).mul_(factor)
        return state


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
) -> Swept:
    """The whole pass; see the module. Products are made in `dtype` and accumulated in float32."""
    n, width = hidden.shape
    device, has_ref = hidden.device, ref_hidden is not None
    transform = Transform(head.logit_scale, head.softcap, temperature)
    sweeper = Sweeper(head, transform, n, dtype, device, has_ref, workspace_mib, params, launch, want_grad)
    column = lambda present=True: torch.empty(n if present else 0, device=device)
    logps, entropy, ref_logps, kl = column(), column(), column(has_ref), column(has_ref)
    spread, lse = column(want_kl_grad).zero_(), column()
    g, g_kl = _Rows(width, device), _Rows(width, device)
    lists: list[Entries] = []
    diffuse: list[Tensor] = []
    ends = [0]
    all_dense = want_grad and not sweeper.lists
    wanted = None if device.type == "meta" else wanted
    needed = _Needed(wanted, sweeper.plan.rows)
    may_give_up = sweeper.lists and params.mode == "auto"
    for r0 in range(0, n, sweeper.plan.rows):
        r1 = min(r0 + sweeper.plan.rows, n)
        block = slice(r0, r1)
        h = hidden[block].to(dtype).contiguous()
        ref_h = ref_hidden[block].to(dtype).contiguous() if has_ref else None
        t, need = targets[block], None if wanted is None else wanted[block]
        select = lambda x, rows: None if x is None else x[rows]

        def dense(rows: Tensor | slice, count: int, reserve: int, centre: Tensor | None = None) -> Tensor:
            """Statistics of some rows of the block, whose directions are kept."""
            pieces = g.take(count, reserve), g_kl.take(count, reserve) if want_kl_grad else None
            diffuse.append(torch.arange(r0, r1, device=device)[rows])  # noqa: B023
            return sweeper.dense(h[rows], select(ref_h, rows), t[rows], *pieces, centre).stats  # noqa: B023

        entries = None
        # Only the first block is asked early; how it ended says what to expect of the others.
        hopeless = needed.most_overflow if may_give_up and r0 == 0 else None
        state = None if all_dense else sweeper.listed(h, ref_h, t, sweeper.lists, hopeless)
        if state is None:
            all_dense = True
            count = r1 - r0 if need is None else needed.count(r0 // sweeper.plan.rows)
            if count == r1 - r0:  # without copies
                stats = dense(slice(None), r1 - r0, n - r0)
            else:
                some, others = (
                    need.nonzero_static(size=count)[:, 0],
                    (~need).nonzero_static(size=r1 - r0 - count)[:, 0],
                )
                stats = torch.empty(10 if has_ref else 4, r1 - r0, device=device)
                if len(some):
                    stats[:, some] = dense(some, len(some), len(some))
                if len(others):
                    stats[:, others] = sweeper.listed(h[others], select(ref_h, others), t[others], False).stats
        else:
            stats = state.stats
        if state is not None and want_grad:
            entries, rows, block_spread, told = entries_of(
                state, transform, epsilon=params.epsilon, max_tail=params.max_tail, wanted=need, keep_kl=want_kl_grad,
                shuffled=launch.path == "fused", vocab=sweeper.vocab, scratch=workspace_mib * 2**17,
            )  # fmt: skip
            all_dense = may_give_up and 2 * told.overflowed > told.wanted
            ends += [ends[-1] + end for end in told.ends[1:]]
            if want_kl_grad:
                spread[block] = block_spread
            if len(rows):
                centre = (stats[D0] + stats[D] / stats[S])[rows] if has_ref else None
                dense(rows, len(rows), len(rows), centre)
        if entries is None:
            entries = _no_entries(r1 - r0, device, want_kl_grad)
            ends += [ends[-1]] * (r1 - r0)
        lists.append(entries)
        log_s = stats[S].log()
        lse[block] = stats[M] + log_s
        logps[block] = stats[TARGET] - lse[block]
        entropy[block] = log_s - stats[X] / stats[S]
        if has_ref:
            ref_lse = stats[REF_M] + stats[REF_S].log()
            ref_logps[block] = stats[REF_TARGET] - ref_lse
            kl[block] = stats[D] / stats[S] + stats[D0] - lse[block] + ref_lse
    return Swept(
        logps, entropy, ref_logps, kl, _join(lists, device, want_kl_grad),
        torch.cat(diffuse) if diffuse else torch.empty(0, dtype=torch.long, device=device), g.all(), g_kl.all(), spread,
        lse, ends,
    )  # fmt: skip


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


def _no_entries(rows: int, device: torch.device, kl: bool) -> Entries:
    # Tensors of their own each: outputs of an operator must not alias each other.
    empty = lambda n=0, of=torch.float32: torch.zeros(n, dtype=of, device=device)
    return Entries(
        empty(rows + 1, torch.long), empty(0, torch.int32), empty(), empty(), empty(rows), empty(rows if kl else 0)
    )


def _join(lists: list[Entries], device: torch.device, kl: bool) -> Entries:
    if not lists:
        return _no_entries(0, device, kl)
    if len(lists) == 1:
        return lists[0]
    counts = torch.cat([part.offsets.diff() for part in lists])
    joined = Entries(*(torch.cat(column) for column in zip(*lists)))
    return joined._replace(offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
