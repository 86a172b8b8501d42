"""Several streams as one. `datasets.interleave_datasets` settles the columns' types by the first rows of each, and ends
where a later row has others; here rows pass as they are."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

from torch.utils.data import IterableDataset

from lowvram_grpo.data.streams import in_order_of_shards, opened_at


class MixedStream(IterableDataset):
    """Rows of several streams.

    Without weights the streams take turns, and each row comes once. With weights a stream is drawn for each row; one
    that has come to its end begins anew until all have (`all_exhausted` of `datasets`).

    Args:
        weights: how likely a row is of each stream; they need not add up to 1.
        seed: of the draws, which are others at each pass.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float] | None = None, seed: int = 0):
        self.parts, self.weights, self.seed, self._epoch = list(parts), weights, seed, 0
        self._start: dict[str, Any] | None = None
        self._begin()

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    @property
    def num_shards(self) -> int:
        return max(getattr(part, "num_shards", 1) for part in self.parts)

    def shuffle(self, seed: int, buffer_size: int = 1) -> MixedStream:
        """With the shards of each stream in a random order."""
        return MixedStream([in_order_of_shards(part, seed) for part in self.parts], self.weights, self.seed)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the row that was given last."""
        states = [self._state(i) for i in range(len(self.parts))]
        return {
            "epoch": self._epoch, "drawn": self._drawn, "passes": list(self._passes), "counts": list(self._counts),
            "ended": list(self._ended), "out": list(self._out), "states": states,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Begin the next iteration there; None: at the beginning."""
        self._start = state

    def __iter__(self) -> Iterator[Any]:
        self._begin()
        start, self._start = self._start, None
        if start is not None and start["epoch"] == self._epoch:
            rows = self._gone_on(start)
        else:
            rows = [self._opened(i) for i in range(len(self.parts))]
        draws = random.Random(f"{self.seed} {self._epoch}")
        for _ in range(self._drawn):
            draws.random()
        while not all(self._ended):
            i = self._draw(draws)
            self._drawn += 1
            row, self._held[i] = next(rows[i], None), None
            if row is None and self._counts[i] and self.weights is not None:
                self._ended[i] = True
                if all(self._ended):
                    return
                self._passes[i], self._counts[i] = self._passes[i] + 1, 0
                rows[i] = self._opened(i)
                row = next(rows[i], None)
            if row is None:
                self._ended[i] = self._out[i] = True
                continue
            self._counts[i] += 1
            yield row

    def _begin(self) -> None:
        n = len(self.parts)
        self._counts, self._passes, self._drawn = [0] * n, [0] * n, 0
        self._ended, self._out = [False] * n, [False] * n
        self._held: list[Any] = [None] * n  # states of streams that were gone on with, and have given no row since

    def _state(self, i: int) -> Any:
        """None at a stream's beginning, and of one that has none: what it would say may be an earlier pass's."""
        if not self._counts[i] or not hasattr(self.parts[i], "state_dict"):
            return None
        return self.parts[i].state_dict() if self._held[i] is None else self._held[i]

    def _draw(self, draws: random.Random) -> int:
        """Which stream gives the next row; one random number each time, whichever are left."""
        number, left = draws.random(), [i for i, out in enumerate(self._out) if not out]
        if self.weights is None:
            return left[self._drawn % len(left)]
        edges = list(accumulate(self.weights[i] for i in left))
        return left[min(bisect(edges, number * edges[-1]), len(left) - 1)]

    def _opened(self, i: int) -> Iterator[Any]:
        self._set_epoch(i)
        return iter(self.parts[i])

    def _set_epoch(self, i: int) -> None:
        if callable(set_epoch := getattr(self.parts[i], "set_epoch", None)):
            set_epoch(self._epoch + self._passes[i])

    def _gone_on(self, start: dict[str, Any]) -> list[Iterator[Any]]:
        """Each stream at the place that it had; by count where it has no states of its own."""
        self._drawn, self._passes, self._counts = start["drawn"], list(start["passes"]), list(start["counts"])
        self._ended, self._out = list(start["ended"]), list(start["out"])
        rows = []
        for i, (part, state) in enumerate(zip(self.parts, start["states"])):
            if state is not None and hasattr(part, "load_state_dict"):
                self._set_epoch(i)
                self._held[i] = state
                rows.append(opened_at(part, state))
            else:
                opened = self._opened(i)
                rows.append(opened)
                for _ in islice(opened, self._counts[i]):
                    pass
        return rows
