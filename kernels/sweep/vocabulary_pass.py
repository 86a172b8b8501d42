"""One block of rows through the whole vocabulary, tile by tile: with lists, or with the dense product."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, starmap
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.cuts import cuts
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.products import add_matmul, matmul
from lowvram_grpo.kernels.sweep.buffers import Buffers, Tiles
from lowvram_grpo.kernels.sweep.fold import fold_torch
from lowvram_grpo.kernels.sweep.fold_triton import fold_triton
from lowvram_grpo.kernels.sweep.fused_fold import fused_fold
from lowvram_grpo.kernels.sweep.launch import LaunchConfig
from lowvram_grpo.kernels.sweep.plan import DirectionParams, plan_tiles
from lowvram_grpo.kernels.sweep.state import D0, TARGET, D, M, Probabilities, RowState, S, X
from lowvram_grpo.kernels.transform import LOWEST, Transform
from torch import Tensor

# On a CPU, making lists costs more than the product they save where hidden states are narrow: 2.5 times the dense
# sweep's time at H = 576 (SmolLM2-135M), 0.63 times at H = 896 (Qwen2.5-Coder-0.5B); docs/LOG.md, 2026-11-21.
_CPU_LISTS_FROM_WIDTH = 768


class Directions(NamedTuple):
    """(r, H) float32 each, to be written to: d logp / d h, and d KL / d h and d entropy / d h where wanted."""

    logp: Tensor
    kl: Tensor | None
    entropy: Tensor | None


class Centres(NamedTuple):
    """(r,) each where it is known from a pass before: E[l - r] and E[l]. What is multiplied by probabilities is rounded
    to the matmul's dtype, so what is subtracted from it afterwards should be small."""

    log_ratio: Tensor | None = None
    logit: Tensor | None = None


UNKNOWN = Centres()


def _cut(flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """A contiguous tile of `shape`."""
    return flat[: shape[0] * shape[1]].view(shape)


class VocabularyPass:
    """The pass over the vocabulary for one head, transform and device; buffers are shared by all row blocks."""

    def __init__(
        self, head: Head, transform: Transform, n: int, dtype: torch.dtype, device: torch.device, has_ref: bool,
        workspace_mib: int, params: DirectionParams, launch: LaunchConfig, want_grad: bool, entropy_gradient: bool,
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
        tile_bytes = (refs + entropy_gradient) * item + 4 * refs + (8 * refs + 4 if launch.path == "torch" else 0)
        list_bytes = (10 + 4 * has_ref) * params.capacity if params.mode != "dense" else 0
        self.plan = plan_tiles(
            n, self.vocab, self.width, workspace_mib, item=item, view=self.view, tile_bytes=tile_bytes,
            row_bytes=refs * self.width * item + list_bytes,
        )  # fmt: skip
        # Rows of float32 weights that fit into the small change.
        self._step = max(1, workspace_mib * 2**20 // 16 // (4 * self.width))
        self.buffers = Buffers(
            self.vocab, self.width, self.plan, dtype, device, has_ref=has_ref, kinds=refs + entropy_gradient,
            view=self.view,
        )  # fmt: skip
        self._decay = torch.empty(self.plan.rows, device=device)
        self.log_epsilon = math.log(params.epsilon)

    def edges(self, columns: int) -> list[int]:
        """Where tiles begin. The fused kernel's first is a probe, and what lies on the device it takes in one more."""
        if self.launch.path == "fused":
            first = min(4096, self.vocab, columns)
            return [0, *range(first, self.vocab, self.vocab if self.view else columns), self.vocab]
        tiles = cuts(self.vocab, columns, self.device)
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

    def fold(
        self, tiles: Tiles, state: RowState, h: Tensor, ref_h: Tensor | None, v0: int, v1: int,
        out: Probabilities | None = None,
    ) -> Tensor:  # fmt: skip
        """Multiply and fold vocabulary entries v0 to v1; returns their weights (v1 - v0, H)."""
        w, bias = self.head.tile(v0, v1, tiles.weights)
        if self.launch.path == "fused" and out is None:
            fused_fold(state, h, ref_h, w, bias, v0, self.transform, self.log_epsilon, self.launch.fused)
            return w
        shape = len(h), v1 - v0
        x = matmul(h, w.T, _cut(tiles.logits, shape))
        ref_x = None if ref_h is None else matmul(ref_h, w.T, _cut(tiles.ref_logits, shape))
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
        fused = self.launch.path == "fused"
        columns = self.buffers.columns(0, 0) if fused else self.plan.columns
        tiles = self.buffers.cut(0 if fused else len(h), columns)
        for i, (v0, v1) in enumerate(pairwise(self.edges(columns))):
            self.fold(tiles, state, h, ref_h, v0, v1)
            if i == 0 and hopeless is not None and v1 < self.vocab and hopeless(state.overflowed):
                return None
        return state

    def dense(
        self, h: Tensor, ref_h: Tensor | None, targets: Tensor, into: Directions, centres: Centres = UNKNOWN, *,
        wide: bool = False,
    ) -> RowState:  # fmt: skip
        """The state after one pass, and the directions of its rows.

        `wide`: tiles of as many columns as the buffers hold of so few rows, for fewer launches; statistics are then
        summed in another order than a pass without gradient sums them.
        """
        state = self.start(h, ref_h, targets, False)
        if centres.log_ratio is not None:
            state.stats[D0] = centres.log_ratio
        l0 = centres.logit
        if l0 is None and into.entropy is not None:  # the target's own, as for log-ratios, unless a bias forbids it
            l0 = state.stats[M].masked_fill(state.stats[M] < LOWEST / 2, 0.0)
        for total in into:
            if total is not None:
                total.zero_()
        wanted = tuple(total is not None for total in into)
        # PyTorch's fold makes copies of its own, which these bytes do not count.
        wide = wide and self.launch.path != "torch"
        columns = self.buffers.columns(len(h), sum(wanted)) if wide else self.plan.columns
        tiles = self.buffers.cut(len(h), columns, wanted)
        for v0, v1 in cuts(self.vocab, columns, self.device):
            p, pd, pl = (None if x is None else _cut(x, (len(h), v1 - v0)) for x in tiles.probabilities)
            out = Probabilities(p, pd, self._decay[: len(h)], pl, l0)
            w = self.fold(tiles, state, h, ref_h, v0, v1, out)
            for total, tile in zip(into, (p, pd, pl)):
                if total is not None:
                    add_matmul(total.mul_(out.decay[:, None]), tile, w)
        self._finish(state, targets, into, l0)
        return state

    def _finish(self, state: RowState, targets: Tensor, into: Directions, l0: Tensor | None) -> None:
        """From sums over the vocabulary to directions."""
        stats, (g, g_kl, g_entropy) = state.stats, into
        mass = stats[S][:, None]
        g.div_(mass)
        factor = self.transform.scale / self.transform.temperature
        if g_kl is not None:
            g_kl.div_(mass).addcmul_(g, (stats[D] / stats[S])[:, None], value=-1).mul_(factor)
        if g_entropy is not None:
            above = stats[M] - l0 + stats[X] / stats[S]  # E[l] - l0
            g_entropy.div_(mass).addcmul_(g, above[:, None], value=-1).mul_(-factor)
        slope = self.transform.slope(stats[TARGET])
        for block in starmap(slice, cuts(len(targets), self._step, self.device)):
            w = self.head.rows(targets[block], self.dtype).float()
            if slope is not None:
                w *= slope[block, None]
            g[block].neg_().add_(w).mul_(factor)
