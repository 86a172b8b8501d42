"""Two slots on a device through which layers pass whose weights wait in host memory.

Layer i of those has slot i mod 2 and no other, so that its weights are at the same addresses whenever they are there:
what holds on to them (autograd, kernels' arguments, a CUDA graph) need not know that they come and go. While a layer is
in use, the one behind it arrives in the other slot, on a stream of its own; in a backward pass that is the one before.

A slot is written again only behind the event that its last reader recorded, and a layer computes only behind the event
of its copy. What a slot holds is known only once its copy has been queued: after a copy that failed it holds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowvram_grpo.memory.ledger import counted_as
from lowvram_grpo.policy.packed import PackedLayer


class Window:
    """Two slots, and which of `layers` are in them.

    Args:
        layers: settled in host memory.
        category: of the slots, in a ledger.

    Attributes:
        slots: uint8 on the device.
    """

    def __init__(self, layers: Sequence[PackedLayer], device: torch.device, category: str):
        self.layers, self.device = layers, device
        size = max(layer.bytes for layer in layers)
        # No slot is made in inference mode: other passes could not write to it.
        with torch.inference_mode(False), counted_as(category):
            self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in layers[:2]]
        self._held: list[int | None] = [None, None]
        self._using: list[int | None] = [None, None]
        self._stream = _copy_stream(device) if device.type == "cuda" else None
        # Events: when a slot's last reader is done (None: with all that the compute stream has been given by now), and
        # when its layer is there (None: at once).
        self._free: list[Any] = [self._now(), self._now()]
        self._arrived: list[Any] = [None, None]
        self.begin()

    def begin(self) -> None:
        """Fetch the layers that a forward pass begins with."""
        self._nothing_in_use()
        for i in range(len(self.slots)):
            self._fetch(i)

    def enter(self, i: int, *, back: bool = False) -> Tensor:
        """The bytes of layer `i`, behind whose arrival the compute stream now waits. They stay until `leave`.

        Args:
            back: it is a backward pass, in which the layer before is next.

        Raises:
            RuntimeError: its slot is in use by another layer.
        """
        slot = i % 2
        if not back:
            self._nothing_in_use()  # a backward pass that was broken off has not said that it is done
        if self._using[slot] not in (None, i):
            raise RuntimeError(f"layers {self._using[slot]} and {i} need the same slot of streamed weights at once")
        self._fetch(i)
        self._using[slot] = i
        self._wait(slot)
        self._ahead(i - 1 if back else i + 1)
        return self.slots[slot]

    def leave(self, i: int, *, back: bool = False, again: bool = False) -> None:
        """Layer `i` has been given all its work; another may come into its slot.

        Args:
            again: a further forward pass is next, without a backward pass before.
        """
        slot = i % 2
        if self._using[slot] != i:
            return
        self._using[slot] = None
        self._free[slot] = self._now()
        follows = i - 2 if back else i + 2
        self._ahead(slot if again and follows >= len(self.layers) else follows)

    def settle(self) -> None:
        """Have the layers there that a forward pass begins with, and no event pending: how a CUDA graph begins and
        ends, which knows nothing of events from outside."""
        self.begin()
        self.close()
        self._free = [None, None]

    def close(self) -> None:
        """Whatever comes into this memory next comes behind every copy."""
        for slot in range(len(self.slots)):
            self._wait(slot)
        self._arrived = [None, None]

    def forget(self) -> None:
        """What the slots hold is not known any more."""
        self._held, self._arrived = [None, None], [None, None]
        self._free = [None, None]

    def _nothing_in_use(self) -> None:
        for slot, i in enumerate(self._using):
            if i is not None:
                self._using[slot], self._free[slot] = None, self._now()

    def _now(self) -> Any:
        """An event behind all that the compute stream has been given so far."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def _ahead(self, i: int) -> None:
        """Begin to copy layer `i` where there is such a layer and its slot is free."""
        if 0 <= i < len(self.layers) and self._using[i % 2] is None:
            self._fetch(i)

    def _fetch(self, i: int) -> None:
        """Begin to copy layer `i` into its slot, unless it is there."""
        slot, layer = i % 2, self.layers[i]
        if self._held[slot] == i:
            return
        self._held[slot] = None  # should the copy fail
        with torch.no_grad():
            # Autograd would take a layer's return for a change of what it has saved of it.
            into = self.slots[slot].data[: layer.bytes]
            if self._stream is None:
                into.copy_(layer.home)
            else:
                self._stream.wait_event(self._free[slot] or self._now())
                with torch.cuda.stream(self._stream):
                    into.copy_(layer.home, non_blocking=True)
                    self._arrived[slot] = self._stream.record_event()
        self._held[slot] = i

    def _wait(self, slot: int) -> None:
        if self._arrived[slot] is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])


_STREAMS: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
