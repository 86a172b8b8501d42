"""The KV cache of a rollout: each prompt once, each completion in a row of its own.

Bytes: layers * KV heads * 2 * head_dim * item * (S * prompt_length + R * completion_length), where a cache without
sharing holds R * (prompt_length + completion_length) tokens. All of it is made at the first pass and stays where it is,
so that CUDA graphs may point to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_grpo.kernels.decode.kv import KV, spread_of, write
from lowvram_grpo.memory.ledger import counted_as
from lowvram_grpo.rollout.states import StateCache


class LayerCache(NamedTuple):
    """Of one layer: its S prompts, its R rows, and the spread (S, KVH, D) of int8 keys."""

    prompts: KV
    own: KV
    spread: Tensor | None

    def keep_prompt(self, slot: int, key: Tensor, value: Tensor) -> None:
        """Write a prompt's keys (KVH, L, D) and values (KVH, L, Dv), as many as the slot has room for."""
        if self.spread is not None:
            self.spread[slot] = spread_of(key)
            key = key / self.spread[slot, :, None]
        length = min(key.shape[1], self.prompts.keys.shape[2])
        write(self.prompts, (slot, slice(None), slice(0, length)), key[:, :length], value[:, :length])

    def keep_own(self, row: int, age: int, slot: int, key: Tensor, value: Tensor) -> None:
        """Write keys (KVH, L, D) and values (KVH, L, Dv) behind the first `age` tokens of a row, whose prompt is in
        `slot`."""
        if self.spread is not None:
            key = key / self.spread[slot, :, None]
        write(self.own, (row, slice(None), slice(age, age + key.shape[1])), key, value)

    def sequence(self, slot: int, before: int, row: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys (KVH, before + length, D) and values of a prompt's first tokens and a row's own behind them: a copy, of
        `dtype`."""
        parts = [(self.prompts, slot, before), (self.own, row, length)]
        keys, values = (
            torch.cat([_read(kv, part, index, n, dtype) for kv, index, n in parts], 1) for part in ("keys", "values")
        )
        if self.spread is not None:
            keys = (keys * self.spread[slot, :, None]).to(dtype)
        return keys, values


def _read(cache: KV, part: str, index: int, length: int, dtype: torch.dtype) -> Tensor:
    codes, scales = (cache.keys, cache.key_scales) if part == "keys" else (cache.values, cache.value_scales)
    found = codes[index, :, :length]
    if scales is None:
        return found.to(dtype)
    # Keys are of float32 until the spread has met them: in float16 it may not hold what is left of them without it.
    found = found.float() * scales[index, :, :length, None]
    return found if part == "keys" else found.to(dtype)


class GroupCache:
    """Keys and values of S prompt slots and R rows.

    Args:
        slots: S, of `prompt_length` tokens each.
        rows: R, of `completion_length` tokens each.
        dtype: `auto` keeps what the model computes; `int8` rounds, with a float32 scale a head and token.

    Attributes:
        states: of the layers that keep one, whatever `dtype` is.
    """

    def __init__(self, slots: int, prompt_length: int, rows: int, completion_length: int, dtype: str = "auto"):
        self.slots, self.prompt_length = slots, prompt_length
        self.rows, self.completion_length, self.dtype = rows, completion_length, dtype
        self._layers: dict[int, LayerCache] = {}
        self.states = StateCache(slots, rows)

    def layer(self, index: int, key: Tensor, value: Tensor) -> LayerCache:
        """That of a layer whose keys and values look like these, (B, KVH, L, D)."""
        if index not in self._layers:
            with counted_as("KV cache"):
                spread = None
                if self.dtype == "int8":
                    shape = self.slots, key.shape[1], key.shape[3]
                    spread = torch.ones(shape, dtype=torch.float32, device=key.device)
                self._layers[index] = LayerCache(
                    self._empty(self.slots, self.prompt_length, key, value),
                    self._empty(self.rows, self.completion_length, key, value),
                    spread,
                )
        return self._layers[index]

    def _empty(self, n: int, length: int, key: Tensor, value: Tensor) -> KV:
        # Zeros: what nobody has written is masked, but 0 times a NaN that lay there is a NaN.
        make = lambda *shape, dtype: torch.zeros(n, key.shape[1], length, *shape, device=key.device, dtype=dtype)
        if self.dtype != "int8":
            return KV(make(key.shape[3], dtype=key.dtype), make(value.shape[3], dtype=value.dtype))
        codes = (make(x.shape[3], dtype=torch.int8) for x in (key, value))
        return KV(*codes, make(dtype=torch.float32), make(dtype=torch.float32))

    @property
    def nbytes(self) -> int:
        """Of keys and values of all layers that have been seen."""
        layers = self._layers.values()
        return sum(x.nbytes for layer in layers for x in (*layer.prompts, *layer.own, layer.spread) if x is not None)

    def move_slot(self, source: int, target: int) -> None:
        """Copy a prompt over another."""
        self.states.move_slot(source, target)
        for layer in self._layers.values():
            _move(layer.prompts, source, target, self.prompt_length)
            if layer.spread is not None:
                layer.spread[target] = layer.spread[source]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another's, and its states."""
        self.states.move_row(source, target)
        for layer in self._layers.values():
            _move(layer.own, source, target, length)

    def close(self) -> None:
        """Free it, also where the frames of an error still hold the object."""
        self.states.close()
        self._layers.clear()


def _move(cache: KV, source: int, target: int, length: int) -> None:
    for x in cache:
        if x is not None:
            x[target, :, :length] = x[source, :, :length]
