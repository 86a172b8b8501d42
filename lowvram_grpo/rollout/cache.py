"""The KV cache of a rollout: each prompt once, each completion in a row of its own.

Bytes: layers * KV heads * 2 * head_dim * item * (S * prompt_length + R * completion_length), where a cache without
sharing holds R * (prompt_length + completion_length) tokens. All of it is made at the first pass and stays where it is,
so that CUDA graphs may point to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_grpo.kernels.decode_attention import KV
from lowvram_grpo.memory.ledger import counted_as


class GroupCache:
    """Keys and values of S prompt slots and R rows.

    Args:
        slots: S, of `prompt_length` tokens each.
        rows: R, of `completion_length` tokens each.
        dtype: `auto` keeps what the model computes; `int8` rounds, with a float32 scale a head and token.
    """

    def __init__(self, slots: int, prompt_length: int, rows: int, completion_length: int, dtype: str = "auto"):
        self.slots, self.prompt_length = slots, prompt_length
        self.rows, self.completion_length, self.dtype = rows, completion_length, dtype
        self._layers: dict[int, tuple[KV, KV]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[KV, KV]:
        """Prompts and rows of a layer whose keys and values look like these, (B, KVH, L, D)."""
        if index not in self._layers:
            with counted_as("KV cache"):
                self._layers[index] = tuple(
                    self._empty(n, length, key, value)
                    for n, length in ((self.slots, self.prompt_length), (self.rows, self.completion_length))
                )
        return self._layers[index]

    def _empty(self, n: int, length: int, key: Tensor, value: Tensor) -> KV:
        # Zeros: what nobody has written is masked, but 0 times a NaN that lay there is a NaN.
        make = lambda *shape, **how: torch.zeros(n, key.shape[1], length, *shape, device=key.device, **how)
        if self.dtype != "int8":
            return KV(make(key.shape[3], dtype=key.dtype), make(value.shape[3], dtype=value.dtype))
        codes = (make(x.shape[3], dtype=torch.int8) for x in (key, value))
        return KV(*codes, make(dtype=torch.float32), make(dtype=torch.float32))

    @property
    def nbytes(self) -> int:
        """Of all layers that have been seen."""
        kinds = (kv for layer in self._layers.values() for kv in layer)
        return sum(x.nbytes for kv in kinds for x in kv if x is not None)

    def move_slot(self, source: int, target: int) -> None:
        """Copy a prompt over another."""
        for prompts, _ in self._layers.values():
            _move(prompts, source, target, self.prompt_length)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another's."""
        for _, own in self._layers.values():
            _move(own, source, target, length)

    def close(self) -> None:
        """Free it, also where the frames of an error still hold the object."""
        self._layers.clear()


def _move(cache: KV, source: int, target: int, length: int) -> None:
    for x in cache:
        if x is not None:
            x[target, :, :length] = x[source, :, :length]
