"""What a sweep knows of its rows while it runs: the statistics that `fold.py` defines, and the lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON, tl
from lowvram_grpo.kernels.transform import LOWEST
from torch import Tensor

# Rows of the statistics buffer. The reference's and the KL's come last: without a reference they do not exist.
M, S, X, TARGET, REF_M, REF_S, REF_TARGET, D0, D, E = range(10)
_constant = tl.constexpr if HAS_TRITON else int
_M, _S, _X, _TARGET, _REF_M, _REF_S, _REF_TARGET, _D0, _D, _E = (
    _constant(i) for i in (M, S, X, TARGET, REF_M, REF_S, REF_TARGET, D0, D, E)
)


@dataclass
class RowState:
    """What is known of R rows so far.

    Attributes:
        stats: (4 or 10, R) float32, see the constants above.
        targets: (R,) int64.
        count: (R,) int32, entries that belonged on the list; more than its capacity means that it overflowed.
        ids: (R, capacity) int32 vocabulary entries; capacity 0 keeps no list.
        logits, ref_logits: (R, capacity) float32 of these entries.
    """

    stats: Tensor
    targets: Tensor
    count: Tensor
    ids: Tensor
    logits: Tensor
    ref_logits: Tensor | None

    @property
    def has_ref(self) -> bool:
        return self.stats.shape[0] > 4

    @property
    def capacity(self) -> int:
        return self.ids.shape[1]

    @property
    def overflowed(self) -> Tensor:
        return self.count > self.capacity

    @classmethod
    def start(
        cls, targets: Tensor, hint: Tensor, ref_hint: Tensor | None, capacity: int, slack: float = 0.0
    ) -> RowState:
        """hint, ref_hint (R,): the targets' logits, up to a relative error of `slack`."""
        rows, device = len(targets), targets.device
        # A target that a bias forbids has a logit of -inf; the maximum must start somewhere.
        hint = hint.clamp(min=LOWEST)
        ref_hint = None if ref_hint is None else ref_hint.clamp(min=LOWEST)
        stats = torch.zeros(4 if ref_hint is None else 10, rows, device=device)
        stats[M] = hint - slack * (1 + hint.abs())
        if ref_hint is not None:
            stats[REF_M], stats[D0] = ref_hint - slack * (1 + ref_hint.abs()), hint - ref_hint
        empty = lambda dtype: torch.empty(rows, capacity, dtype=dtype, device=device)
        return cls(
            stats,
            targets,
            torch.zeros(rows, dtype=torch.int32, device=device),
            empty(torch.int32),
            empty(torch.float32),
            None if ref_hint is None else empty(torch.float32),
        )


class Probabilities(NamedTuple):
    """Where the dense direction wants e^(l-m) [and e^(l-m) d, and e^(l-m) (l-l0)], times the soft-cap's slope: (R, C)
    of the matmul's dtype; and the factor (R,) float32 that rescales what was accumulated under the old maximum.

    l0 (R,) float32 is given, any constant of the row: unlike l-m, l-l0 stays what it was when the maximum grows, so
    one factor rescales all three."""

    p: Tensor
    pd: Tensor | None
    decay: Tensor
    pl: Tensor | None = None
    l0: Tensor | None = None
