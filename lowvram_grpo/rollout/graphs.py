"""A decode step as one CUDA graph: one launch where PyTorch makes hundreds.

A step is captured for each number of rows it runs with, rounded up to a bucket, at its second use: the first runs as it
is, so that libraries choose their algorithms and buffers outside of a capture. Everything a step reads or writes must
stay where it is, so graphs live no longer than the KV cache. They share one memory pool: only one runs at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch

from lowvram_grpo.errors import one_line


def bucket(rows: int, most: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `rows`, but not above `most`."""
    power = 1 << (rows - 1).bit_length()
    between = power * 3 // 4
    return min(most, between if rows <= between and power > 2 else power)


class StepGraphs:
    """Runs `step(rows)` by a graph where one has been captured.

    Args:
        step: launches the step's work for a number of rows; depends on tensors alone.
        most: rows at most.
        enabled: False runs every step as it is.
    """

    def __init__(self, step: Callable[[int], None], most: int, *, enabled: bool):
        self.step, self.most, self.enabled = step, most, enabled
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._pool = None

    def width(self, rows: int) -> int:
        """Rows that a step for `rows` live ones runs with."""
        return bucket(rows, self.most) if self.enabled else rows

    def __call__(self, rows: int) -> None:
        graph = self._graphs.get(rows)
        if not self.enabled or rows not in self._graphs:
            self._graphs[rows] = None
            self.step(rows)
            return
        if graph is None and not self._capture(rows):
            self.step(rows)
            return
        self._graphs[rows].replay()

    def _capture(self, rows: int) -> bool:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # what the allocator keeps of a prefill is of no use to the graph's own pool
        # Casts of weights that autocast would keep from one graph to the next are made by none of them.
        casts = nullcontext()
        if torch.is_autocast_enabled("cuda"):
            casts = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)
        try:
            with casts, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self.step(rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.enabled = False
            warnings.warn(
                f"the decode step cannot be captured in a CUDA graph ({one_line(error)}), so rollouts launch every "
                "operation on its own, which is slower.",
                stacklevel=2,
            )
            return False
        self._pool = self._pool or graph.pool()
        self._graphs[rows] = graph
        return True

    def close(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()
        self._pool = None
