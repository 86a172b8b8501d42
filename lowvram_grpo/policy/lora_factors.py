"""The factors of the LoRA layers' adapter in the dtype that they are computed in, laid out for few launches.

Copies in 16 bits are made at once for a pass through the decoder, and of a layer at once where it is computed again;
they keep their memory from one time to the next.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.memory.ledger import counted_as
from lowvram_grpo.policy.frozen_base import is_touched
from lowvram_grpo.policy.plain_lora import PlainLora, acting


class Block(NamedTuple):
    """A factor of one layer, or of siblings one below the other: a (r, I); which columns of z are its own; and s."""

    a: Tensor
    columns: slice
    scaling: float


class Factors(NamedTuple):
    """One adapter of a group, in the dtype that it is computed in.

    Attributes:
        blocks: from x to z.
        b: of each layer (O, r).
        columns: of z, of each layer.
    """

    blocks: list[Block]
    b: list[Tensor]
    columns: list[slice]


class LoraGroup:
    """LoRA layers that are likely to be given the same tensor."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    def acting(self) -> list[PlainLora] | None:
        """The adapter that acts in all of these layers; None where it is not one and the same, and plain."""
        loras = [acting(layer) for layer in self.layers]
        if None in loras or len({lora.name for lora in loras}) > 1:
            return None
        return None if any(is_touched(layer.base_layer) for layer in self.layers) else loras


class FactorCache:
    """The copies of one model's acting adapter, a group of layers each."""

    def __init__(self):
        self.groups: list[LoraGroup] = []
        self.forget()

    def forget(self) -> None:
        self._made: dict[LoraGroup, tuple[Factors, int]] = {}
        self._buffers: dict[tuple[LoraGroup, int], Tensor] = {}
        self._key, self._stale, self._backward = None, True, False

    def pass_begins(self, *_: Any) -> None:
        """A hook of the decoder. Weights may have changed, and an optimizer's kernel leaves no version behind."""
        self._stale, self._backward = True, False

    def factors(self, group: LoraGroup, loras: list[PlainLora], dtype: torch.dtype) -> Factors:
        """In a forward pass all groups' copies are made at once, which is what autocast's cache would hold; in a
        backward pass a group's are made when its layer is computed again, and held until its gradients are there."""
        key, backward = (loras[0].name, dtype), torch._C._current_graph_task_id() != -1
        if key != self._key or (backward and not self._backward):
            self.forget()
            self._key, self._backward = key, backward
        if self._stale and not backward:
            self._refresh()
        made, version = self._made.get(group, (None, 0))
        if made is None or version != _version(loras):
            made, _ = self._made[group] = self._copy([(group, loras)])[0]
        return made

    def release(self, group: LoraGroup) -> None:
        """The group's gradients are there: what a backward pass has copied for it is let go."""
        if self._backward and self._made.pop(group, None):
            self._buffers = {key: buffer for key, buffer in self._buffers.items() if key[0] is not group}

    def _refresh(self) -> None:
        """All groups' in a few launches."""
        every = [(group, loras) for group in self.groups if (loras := group.acting()) and loras[0].name == self._key[0]]
        self._made = dict(zip((group for group, _ in every), self._copy(every)))
        self._stale = False

    def _copy(self, every: list[tuple[LoraGroup, list[PlainLora]]]) -> list[tuple[Factors, int]]:
        dtype, made, targets, sources = self._key[1], [], [], []
        # A pass in inference mode would leave buffers that no other pass may write to.
        with torch.inference_mode(False), torch.no_grad(), counted_as("adapter"):
            for group, loras in every:
                ends = list(accumulate((len(lora.a) for lora in loras), initial=0))
                columns = [slice(*pair) for pair in pairwise(ends)]
                if all(lora.a.dtype == dtype for lora in loras):
                    blocks = [Block(x.a.detach(), part, x.scaling) for x, part in zip(loras, columns)]
                else:
                    a = self._buffer(group, -1, (ends[-1], loras[0].a.shape[1]), loras[0].a.device)
                    targets += [a[part] for part in columns]
                    sources += [lora.a.detach() for lora in loras]
                    alike = len({lora.scaling for lora in loras}) == 1
                    parts = [slice(0, ends[-1])] if alike else columns
                    blocks = [Block(a[part], part, lora.scaling) for part, lora in zip(parts, loras)]
                b = []
                for i, lora in enumerate(loras):
                    if lora.b.dtype == dtype:
                        b.append(lora.b.detach())
                    else:
                        b.append(self._buffer(group, i, lora.b.shape, lora.b.device))
                        targets.append(b[-1])
                        sources.append(lora.b.detach())
                made.append((Factors(blocks, b, columns), _version(loras)))
            if targets:
                torch._foreach_copy_(targets, sources)
        return made

    def _buffer(self, group: LoraGroup, i: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The same memory as the last time."""
        old = self._buffers.get((group, i))
        if old is None or old.shape != shape or old.device != device:
            self._buffers[group, i] = old = torch.empty(shape, dtype=self._key[1], device=device)
        return old


def _version(loras: list[PlainLora]) -> int:
    """Grows whenever one of the factors is changed by an operator."""
    return sum(lora.a._version + lora.b._version for lora in loras)
