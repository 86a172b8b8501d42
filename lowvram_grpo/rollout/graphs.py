"""A decode step as one CUDA graph: one launch where PyTorch makes hundreds.

A step is captured for each number of rows it runs with, rounded up to a bucket, at its second use. The first runs as it
is, so that libraries choose their algorithms, kernels are compiled, and an operation that waits for the device is found
before a capture: one that fails leaves PyTorch's allocator in no state to go on with. Everything a step reads or writes
must stay where it is, so graphs live no longer than the KV cache. They share one memory pool: only one runs at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch

from lowvram_grpo.errors import one_line

# What PyTorch says of an operation that waits, under torch.cuda.set_sync_debug_mode("error").
_SYNCHRONIZES = "synchronizing"


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
        if not self.enabled:
            self.step(rows)
        elif rows not in self._graphs:
            self._graphs[rows] = None
            self._first(rows)
        else:
            if self._graphs[rows] is None:
                self._capture(rows)
            self._graphs[rows].replay()

    def _first(self, rows: int) -> None:
        """Run a step that raises where it would wait for the device; it may be run again from its beginning."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.step(rows)
            return
        except RuntimeError as error:
            if _SYNCHRONIZES not in str(error):
                raise
            self.enabled = False
            warnings.warn(
                f"the decode step of this model waits for the GPU ({one_line(error)}), so it cannot be a CUDA graph, "
                "and rollouts launch every operation on its own, which is slower.",
                stacklevel=2,
            )
        finally:
            torch.cuda.set_sync_debug_mode(before)
        self.step(rows)

    def _capture(self, rows: int) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # Casts of weights that autocast would keep from one graph to the next are made by none of them.
        casts = nullcontext()
        if torch.is_autocast_enabled("cuda"):
            casts = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)
        try:
            with casts, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self.step(rows)
        except BaseException:
            torch.cuda.set_stream(stream)  # which torch.cuda.graph leaves as it was only where it ends well
            raise
        self._pool = self._pool or graph.pool()
        self._graphs[rows] = graph

    def close(self) -> None:
        """Free the graphs and their memory, and let go of whoever steps: a circle would keep his tensors until Python
        looks for circles."""
        self._graphs.clear()
        self.step = None
        self._pool = None
