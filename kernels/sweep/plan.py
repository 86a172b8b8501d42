"""What a sweep is told: how the gradient's direction is found, and into what tiles rows and vocabulary are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MODES = ("auto", "sparse", "dense")
_MAX_ROWS = 2048


@dataclass(frozen=True)
class DirectionParams:
    """How the gradient direction is found.

    Attributes:
        mode: `sparse` lists for every row that they can serve, `dense` the full product, `auto` decides by block.
        epsilon: smallest probability that is listed.
        capacity: entries that a list can hold; rows with more are diffuse.
        max_tail: probability that may be missing from a list; rows with more are diffuse. On hidden states of
            Qwen2.5-Coder-0.5B and SmolLM2-135M these defaults keep the error of the log-prob's direction under a
            quarter of what rounding the logits to bfloat16 costs. The entropy's, to which improbable entries add more,
            is 1 to 3 %, up to what that rounding costs; with an epsilon of 2^-19 it would be a fifth, for 10 to 25 %
            more FLOP.
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
