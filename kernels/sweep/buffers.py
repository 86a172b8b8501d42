"""The tiles of a sweep, cut out of one piece of memory that all of its passes share.

How many columns a tile has is a matter of launches, not of memory: a pass that needs no logits in memory (fused), or
that has few rows (diffuse ones), gets wider tiles out of the same bytes.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.sweep.plan import TilePlan
from torch import Tensor

_ALIGNED = 256  # bytes: cuBLAS and the copy engine want 16, the allocator gives 512


class Tiles(NamedTuple):
    """What a pass writes to: `weights` (columns, H) of the products' dtype, empty where a tile of the head is a view;
    the others are flat, long enough for rows x columns, or None.

    Attributes:
        logits, ref_logits: float32.
        probabilities: one each of what the dense direction multiplies, of the products' dtype; None where not wanted.
    """

    weights: Tensor
    logits: Tensor | None
    ref_logits: Tensor | None
    probabilities: tuple[Tensor | None, ...]


class Buffers:
    """
    Args:
        plan: the tiles whose bytes are what there is.
        kinds: how many tiles of probabilities those bytes count.
        view: tiles of the head need no memory.
    """

    def __init__(
        self, vocab: int, width: int, plan: TilePlan, dtype: torch.dtype, device: torch.device, *, has_ref: bool,
        kinds: int, view: bool,
    ):  # fmt: skip
        self.vocab, self.width, self.plan, self.dtype, self.device = vocab, width, plan, dtype, device
        self.has_ref, self.view = has_ref, view
        self._item = torch.empty(0, dtype=dtype).element_size()
        self._logits = 4 * (1 + has_ref)
        self._column = 0 if view else width * self._item
        self._bytes = plan.columns * (plan.rows * (self._logits + kinds * self._item) + self._column)
        # Made when first used: the fused kernel on a dense head needs nothing but for diffuse rows.
        self._memory: Tensor | None = None

    def columns(self, rows: int, kinds: int) -> int:
        """How wide tiles of `rows` rows can be, with `kinds` tiles of probabilities; `rows` 0: without any logits."""
        each = rows * (self._logits + kinds * self._item) + self._column
        columns = self._bytes // max(1, each)
        return max(1, min(self.vocab, columns - columns % 128 if columns > 128 else columns))

    def cut(self, rows: int, columns: int, wanted: tuple[bool, ...] = ()) -> Tiles:
        """Tiles of `rows` x `columns`, over those that were cut before; `wanted`: which probabilities."""
        count, item = rows * columns, self._item
        sizes = [0 if self.view else columns * self.width * item, 4 * count, 4 * count if self.has_ref else 0]
        sizes += [item * count if want else 0 for want in wanted]
        starts = [0, *accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
        if starts[-1] and (self._memory is None or 4 * len(self._memory) < starts[-1]):
            self._memory = torch.empty(max(self._bytes + 8 * _ALIGNED, starts[-1]) // 4, device=self.device)

        def piece(i: int, dtype: torch.dtype) -> Tensor | None:
            words = slice(starts[i] // 4, -(-(starts[i] + sizes[i]) // 4))
            return self._memory[words].view(dtype) if sizes[i] else None

        weights = piece(0, self.dtype)
        if weights is None:
            weights = torch.empty(0, dtype=self.dtype, device=self.device)
        return Tiles(
            weights[: columns * self.width].view(-1, self.width), piece(1, torch.float32), piece(2, torch.float32),
            tuple(piece(3 + i, self.dtype) for i in range(len(wanted))),
        )  # fmt: skip
