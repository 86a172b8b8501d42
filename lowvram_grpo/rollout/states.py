"""The states of a rollout in layers that keep one (see `policy/recurrent.py`), beside its KV cache.

Each prompt's state behind all but its last token is computed once and kept in the prompt's slot; a row begins with a
copy of it. A row's state is written in place, so that CUDA graphs may point to it, and moves with its row. Unlike keys
and values it has no place for each token: it cannot be cut back, and where a conversation goes on behind what a row
drew beyond its turn's end, that row's state must not have followed (`frozen` of `Decoder`).

Bytes: those of a state, in the dtype that the layer gives it (float32 for most recurrences), times S + R. They do not
depend on how long anything is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from lowvram_grpo.memory.ledger import counted_as
from lowvram_grpo.policy.recurrent import StateKey, States

CATEGORY = "recurrent states"


class StateCache:
    """States of S prompt slots and R rows, layer by layer; zeros, a sequence's beginning, where nothing was kept."""

    def __init__(self, slots: int, rows: int):
        self.slots, self.rows = slots, rows
        self._layers: dict[int, dict[StateKey, tuple[Tensor, Tensor]]] = {}

    def _place(self, layer: int, key: StateKey, like: Tensor) -> tuple[Tensor, Tensor]:
        """(S, ...) and (R, ...) of a state that looks like (B, ...)."""
        places = self._layers.setdefault(layer, {})
        if key not in places:
            with counted_as(CATEGORY):
                prompts, rows = (like.new_zeros(n, *like.shape[1:]) for n in (self.slots, self.rows))
            places[key] = prompts, rows
        return places[key]

    def keep_prompts(self, layer: int, slots: Sequence[int], states: States) -> None:
        """Those behind prompts, one a slot."""
        for key, found in states.found.items():
            prompts = self._place(layer, key, found)[0]
            for slot, state in zip(slots, found):
                prompts[slot] = state

    def of_rows(self, layer: int, first: int, count: int, frozen: Tensor | None = None) -> States:
        """Those of `count` rows from `first` on, in their places, or copies of them where `frozen` is given."""
        parts = {key: rows[first : first + count] for key, (_, rows) in self._layers.get(layer, {}).items()}
        return States(parts if frozen is None else {key: part.clone() for key, part in parts.items()})

    def keep_rows(self, layer: int, first: int, states: States, frozen: Tensor | None = None) -> None:
        """What became of `of_rows`; rows that are `frozen` (count,) bool keep what they have."""
        for key, found in states.found.items():
            part = self._place(layer, key, found)[1][first : first + len(found)]
            if frozen is not None:
                found = torch.where(frozen.view(-1, *[1] * (found.dim() - 1)), part, found)
            if found.data_ptr() != part.data_ptr() or found.is_meta:
                part.copy_(found)

    def begin(self, slots: Sequence[tuple[int, int | None]]) -> None:
        """Have rows begin behind the prompts of these slots: (row, slot) with rows in ascending order, and None for a
        prompt of one token, which has nothing before it."""
        runs = []
        for _, run in groupby(enumerate(slots), lambda each: (each[1][0] - each[0], each[1][1])):
            pairs = [pair for _, pair in run]
            runs.append((pairs[0][0], pairs[-1][0] + 1, pairs[0][1]))
        for prompts, rows in self._tensors():
            for first, last, slot in runs:
                if slot is None:
                    rows[first:last].zero_()
                else:
                    rows[first:last] = prompts[slot]

    def move_slot(self, source: int, target: int) -> None:
        """Copy a prompt's over another's."""
        for prompts, _ in self._tensors():
            prompts[target] = prompts[source]

    def move_row(self, source: int, target: int) -> None:
        """Copy a row's over another's."""
        for _, rows in self._tensors():
            rows[target] = rows[source]

    def _tensors(self) -> list[tuple[Tensor, Tensor]]:
        return [pair for places in self._layers.values() for pair in places.values()]

    @property
    def nbytes(self) -> int:
        """Of all layers that have been seen."""
        return sum(x.nbytes for pair in self._tensors() for x in pair)

    def close(self) -> None:
        """Free them."""
        self._layers.clear()
