"""Experts that wait in host memory in 4 bits and come to the card as tokens choose them.

Every layer has places on the card for some of its experts: who was chosen longest ago makes room. A token chooses few
experts, and neighbouring tokens often the same, so a decode step fetches only what is not there yet. A training pass
uses nearly all of them: those that are there stay, the others pass through two slots that all layers share, one
arriving while the one before computes. No expert of a pass makes room for another of the same pass, so a pass that
needs more than has places fetches only what is lacking, however often it comes.

The host must know who was chosen before it can fetch: the one wait a layer that 4-bit experts take anyway
(`quantized_experts`). Copies run on a stream of their own. A slot is written only behind all work that was queued when
its layer began (or, of the two shared ones, behind its last reader), and read only behind the event of its copy. An
expert counts as there once its copy is queued: a copy that fails is an error, and the next pass fetches again.

The same code runs on a CPU (copies to other memory, the same bits) and on meta, where a ledger sees the places.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import psutil  # comes with accelerate
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.host import host_buffer, locked_size
from lowvram_grpo.memory.ledger import counted_as, held_on_host
from lowvram_grpo.policy.expert_records import Layout

CATEGORY = "streamed weights"
_RING = 2
#: Page-locked memory comes in powers of two; as many experts share a piece as leave least of it unused.
_TOGETHER = 64
_GIB = 2**30


class ExpertStore:
    """What the layers of a model share: the stream of copies, and two slots for experts that only pass through.

    Args:
        device: where experts compute.

    Attributes:
        layers: in the order in which they were added.
        fetched: bytes that were copied to the device so far.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.layers: list[StoredExperts] = []
        self.fetched = 0
        self.ring: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        """Of all records, in host memory."""
        return sum(layer.experts * layer.layout.bytes for layer in self.layers)

    def add(self, experts: int, waiting: int, layout: Layout) -> StoredExperts:
        """A layer's experts, without weights yet, of which so many have no place on the device.

        Raises:
            UserError: the host has not that much memory left.
        """
        layer = StoredExperts(self, experts, experts - waiting, layout)
        self.layers.append(layer)
        size = max(layer.layout.bytes for layer in self.layers)
        if not self.ring or len(self.ring[0]) < size:
            with counted_as(CATEGORY):
                self.ring = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(_RING)]
        return layer

    def queued(self) -> Any:
        """An event behind all that the compute stream has been given so far."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def fetch(self, record: Tensor, slot: Tensor, after: Any) -> Any:
        """Begin to copy a record to a slot behind the event `after`; the event behind the copy."""
        self.fetched += record.nbytes
        if self._stream is None:
            slot.copy_(record)
            return None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            slot.copy_(record, non_blocking=True)
            return self._stream.record_event()

    def arrived(self, event: Any) -> None:
        """The compute stream goes on behind the event of a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class StoredExperts:
    """The records of a layer's experts (E), in host memory, and those that have a place on the device."""

    def __init__(self, store: ExpertStore, experts: int, places: int, layout: Layout):
        self.store, self.experts, self.layout = store, experts, layout
        self._per_piece = _together(layout.bytes, experts)
        self._pieces = [
            _piece(min(self._per_piece, experts - first) * layout.bytes, store.device)
            for first in range(0, experts, self._per_piece)
        ]
        with counted_as(CATEGORY):
            self._places = torch.empty(places, layout.bytes, dtype=torch.uint8, device=store.device)
        self._free = list(range(places))
        # Expert -> (place, event behind its copy), whoever was chosen longest ago first.
        self._there: OrderedDict[int, tuple[int, Any]] = OrderedDict()

    @property
    def locked(self) -> bool:
        """Whether copies need not be waited for."""
        return self.store.device.type != "cuda" or all(piece.is_pinned() for piece in self._pieces)

    def record(self, expert: int) -> Tensor:
        """In host memory (meta where the device is)."""
        piece, place = divmod(expert, self._per_piece)
        size = self.layout.bytes
        return self._pieces[piece][place * size : (place + 1) * size]

    def visit(self, used: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See `quantized_experts.Home`."""
        if self.store.device.type == "meta":
            slot = self.store.ring[0][: self.layout.bytes]
            return ((expert, slot) for expert in used)
        return self._visit(used)

    def _visit(self, used: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        store, size = self.store, self.layout.bytes
        begun = store.queued()
        passing = iter(self._settle(used, begun))
        ring = [slot[:size] for slot in store.ring]
        coming: dict[int, tuple[int, Any]] = {}
        for slot, expert in enumerate(islice(passing, _RING)):
            coming[expert] = (slot, store.fetch(self.record(expert), ring[slot], begun))
        for expert in used:
            if expert not in coming:
                place, event = self._there[expert]
                store.arrived(event)
                yield expert, self._places[place]
                continue
            slot, event = coming.pop(expert)
            store.arrived(event)
            yield expert, ring[slot]
            for following in islice(passing, 1):
                coming[following] = (slot, store.fetch(self.record(following), ring[slot], store.queued()))

    def _settle(self, used: Sequence[int], begun: Any) -> list[int]:
        """Begin to fetch those that get a place; the experts that do not, ascending."""
        for expert in used:
            if expert in self._there:
                self._there.move_to_end(expert)
        lacking = [expert for expert in used if expert not in self._there]
        here = set(used)
        for i, expert in enumerate(lacking):
            if not self._free:
                oldest = next(iter(self._there), None)
                if oldest is None or oldest in here:
                    return lacking[i:]
                self._free.append(self._there.pop(oldest)[0])
            event = self.store.fetch(self.record(expert), self._places[self._free[-1]], begun)
            self._there[expert] = (self._free.pop(), event)
        return []


def _together(size: int, experts: int) -> int:
    """Neighbouring experts that share a piece of host memory."""
    taken = lambda n: experts // n * locked_size(n * size) + locked_size(experts % n * size)
    return min(range(1, min(_TOGETHER, experts) + 1), key=taken)


def _piece(size: int, device: torch.device) -> Tensor:
    with _disable_current_modes():
        if device.type == "meta":
            made = torch.empty(size, dtype=torch.uint8, device=device)
        elif size > psutil.virtual_memory().available:
            raise UserError(
                f"expert_offload keeps the experts in host memory, of which "
                f"{psutil.virtual_memory().available / _GIB:.1f} GiB are left; close other programs, or take a smaller "
                "model."
            )
        else:
            made = host_buffer(size, pinned=device.type == "cuda")
    held_on_host("weights", size, locked=device.type != "cuda" or made.is_pinned())
    return made
