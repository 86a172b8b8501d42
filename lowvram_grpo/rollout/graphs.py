"""A decode step as one CUDA graph: one launch where PyTorch makes hundreds.

A step is captured for a number of rows, rounded up to a bucket, at its second use. The first runs as it is, so that
libraries choose their algorithms, kernels are compiled, and an operation that waits for the device is found before a
capture: one that fails leaves PyTorch's allocator in no state to go on with. Everything a step reads or writes must
stay where it is, so graphs live no longer than the KV cache and the adapters' buffers, which are given back before a
training pass. They share one memory pool: only one runs at a time.

Requests run out at the end of a rollout. A graph that is wider than the live rows gives them the same tokens, and rows
that nobody waits for cost little (they attend to their own new token only), so it goes on until half of its rows are
gone and enough steps may follow to pay for another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch

from lowvram_grpo.errors import one_line
from lowvram_grpo.kernels.runtime import sync_debug

# What PyTorch says of an operation that waits, under torch.cuda.set_sync_debug_mode("error").
_SYNC_ERROR = "synchronizing"
# Steps that must be possible for a narrower graph to be worth it. Estimated, not measured: another width costs a step
# launched one by one and a capture with its instantiation, some 1,300 launches each, 40 to 60 ms of the host; half the
# rows save logits, sampling and attention of the other half, 0.2 to 0.5 ms of a step.
_MIN_STEPS_FOR_CAPTURE = 128


def bucket(rows: int, max_rows: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `rows`, but not above `max_rows`."""
    power = 1 << (rows - 1).bit_length()
    between = power * 3 // 4
    return min(max_rows, between if rows <= between and power > 2 else power)


class StepGraphs:
    """Runs `step(rows)` by a graph where one has been captured.

    Args:
        step: launches the step's work for a number of rows; depends on tensors alone.
        max_rows: rows at most.
        enabled: False runs every step as it is.
        put_back: called before a step is run again that failed on its way, to undo what would not come out the same.
    """

    def __init__(
        self,
        step: Callable[[int], None],
        max_rows: int,
        *,
        enabled: bool,
        put_back: Callable[[], None] = lambda: None,
    ):
        self.step, self.max_rows, self.enabled, self.put_back = step, max_rows, enabled, put_back
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._pool = None

    def width(self, rows: int, left: int = 0) -> int:
        """Rows that a step for `rows` live ones runs with, where at most `left` steps follow: those of the narrowest
        graph there is, or of a new one where none is wide enough or all have twice as many rows and steps are left."""
        if not self.enabled:
            return rows
        own = bucket(rows, self.max_rows)
        known = min((width for width in self._graphs if width >= rows), default=None)
        if known is None or (2 * own <= known and left >= _MIN_STEPS_FOR_CAPTURE):
            return own
        return known

    def __call__(self, rows: int) -> None:
        if not self.enabled:
            self.step(rows)
        elif rows not in self._graphs:
            self._graphs[rows] = None
            self._warm_up(rows)
        else:
            if self._graphs[rows] is None:
                self._capture(rows)
            self._graphs[rows].replay()

    def _warm_up(self, rows: int) -> None:
        """Run a step that raises where it would wait for the device; it may be run again from its beginning."""
        try:
            with sync_debug("error"):
                self.step(rows)
            return
        except RuntimeError as error:
            if _SYNC_ERROR not in str(error):
                raise
            self.enabled = False
            warnings.warn(
                f"the decode step of this model waits for the GPU ({one_line(error)}), so it cannot be a CUDA graph, "
                "and rollouts launch every operation on its own, which is slower.",
                stacklevel=2,
            )
        self.put_back()
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
        self.step = self.put_back = None
        self._pool = None
