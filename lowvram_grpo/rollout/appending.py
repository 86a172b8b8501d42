"""Tokens that are put behind what a row has cached: between two turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_grpo.memory.host import upload
from lowvram_grpo.policy.attend import attend_by_blocks, attend_causally, causal_bias
from lowvram_grpo.policy.attention import AttentionParams, Layout, attention_dtype, ranges
from lowvram_grpo.policy.recurrent import CONTINUES, Run
from lowvram_grpo.rollout.cache import GroupCache


class Appended(NamedTuple):
    """Tokens that are put behind a row's own.

    Attributes:
        row, slot: of the cache; `slot` holds the row's prompt.
        before: cached tokens of that prompt.
        age: cached tokens of the row.
        count: of the new ones.
    """

    row: int
    slot: int
    before: int
    age: int
    count: int


class AppendLayout(Layout):
    """One packed row (1, L) of tokens that are put behind those of cached rows, without padding.

    Token i of a row's new ones attends to its prompt, to all that the row has cached, and to new ones 0 .. i. By sdpa
    with a bias, a row at a time: each has its own number of keys.

    Memory of a layer while it runs: K and V of one row and its prompt, for the query heads, and a (count, keys) bias a
    row that the layers share.
    """

    def __init__(self, cache: GroupCache, pieces: Sequence[Appended]):
        super().__init__()
        self.cache, self.pieces = cache, list(pieces)
        self._biases: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}

    def positions(self, device: torch.device) -> Tensor:
        """(1, L) int64."""
        return upload([ranges([(p.before + p.age, p.count) for p in self.pieces])], device)[0][None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        owner, outs, end = self.owner(layer, key), [], 0
        layer_cache = self.cache.layer(owner, key, value)
        dtype = attention_dtype(query.device, query.dtype)
        for row, slot, before, age, count in self.pieces:
            begin, end = end, end + count
            if owner == layer:
                layer_cache.keep_own(row, age, slot, key[0, :, begin:end], value[0, :, begin:end])
            keys, values = layer_cache.sequence(slot, before, row, age + count, dtype)
            q = query[:, :, begin:end].to(dtype)
            outs.append(self._behind(before + age, q, keys[None], values[None], params))
        return torch.cat(outs, 2).transpose(1, 2)

    def recur(self, layer: int, hidden: Tensor, run: Run) -> Tensor:
        outs, end = [], 0
        for piece in self.pieces:
            begin, end = end, end + piece.count
            states = self.cache.states.of_rows(layer, piece.row, 1)
            tokens = hidden[:, begin:end]
            outs += [run(part, states) for part in ([tokens] if CONTINUES else tokens.split(1, 1))]
            self.cache.states.keep_rows(layer, piece.row, states)
        return torch.cat(outs, 1)

    def _behind(self, before: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """(1, heads, count, Dv) of one row."""
        count = q.shape[2]
        window = None if params.window is None or params.window >= before + count else params.window
        if params.softcap is not None:
            return attend_by_blocks(
                q, k, v, scale=params.scale, softcap=params.softcap, sinks=params.sinks, before=before, window=window
            )
        case = before, count, window, q.dtype
        if case not in self._biases:
            self._biases[case] = causal_bias(before, count, window, q.dtype, q.device)
        return attend_causally(q, k, v, self._biases[case], scale=params.scale, sinks=params.sinks)


def packs_of(pieces: Sequence[tuple[Appended, list[int]]], tokens: int) -> list[list[tuple[Appended, list[int]]]]:
    """(piece, its ids) of rows, in packs of at most `tokens` that go through the decoder one after another; a piece
    that is longer than what is left of a pack is cut."""
    packs, left = [], 0
    for piece, ids in pieces:
        while ids:
            if not left:
                packs.append([])
                left = tokens
            part, ids = ids[:left], ids[left:]
            packs[-1].append((piece._replace(count=len(part)), part))
            piece = piece._replace(age=piece.age + len(part))
            left -= len(part)
    return packs
