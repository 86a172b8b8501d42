"""Activations wait for the backward pass in host memory.

With activation checkpointing, what a decoder keeps between its passes is the input of each layer: layers x tokens x
hidden values. Autograd's hooks for saved tensors see these inputs (non-reentrant checkpointing saves them through the
hooks around it), copy them out in the forward pass and back in the backward pass, one tensor ahead of its use.

On CUDA the copies run on a stream of their own. The compute stream waits for a copy out two tensors later, and only
then is the tensor let go, so that the allocator never sees memory that another stream still reads, however far the host
runs ahead. (`record_stream` would be shorter, but delays the reuse until the GPU has caught up with the host: no memory
would be saved.) All uses of a host buffer are on the copy stream, in order, so a buffer may be given out again at once.

On a CPU the same code copies to other memory; on meta it keeps nothing, so a ledger counts what a GPU would hold.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_grpo.memory.host import host_buffer
from lowvram_grpo.memory.ledger import held_on_host

#: Tensors below this stay where they are: the copy would cost more than the memory is worth.
MIN_BYTES = 2**18
_IN_FLIGHT = 2


class _CopyStream:
    """The copies of one device, and the host buffers they use. Lives as long as the process: buffers serve again."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[Tensor] = []

    def buffer(self, size: int) -> Tensor | None:
        """At least `size` bytes (uint8) of host memory, page-locked where that helps."""
        if self.device.type == "meta":
            return None
        fitting = [i for i, b in enumerate(self._free) if b.numel() >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        if self._free:
            # In its place, so that there are never more buffers than were in use at once.
            self._free.pop(min(range(len(self._free)), key=lambda i: self._free[i].numel()))
        room = 2**20 * math.ceil(size / 2**20) if self.stream else size
        with _disable_current_modes():  # a ledger on a CPU would take it for the device's
            return host_buffer(room, pinned=self.stream is not None)

    def give_back(self, buffer: Tensor | None) -> None:
        if buffer is not None:
            self._free.append(buffer)

    @torch.no_grad()
    def copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy behind all that the compute stream has been given so far; what to wait for."""
        if self.stream is None:
            to.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the compute stream wait."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


_STREAMS: dict[torch.device, _CopyStream] = {}


class _Offloaded:
    """One saved tensor, in host memory."""

    def __init__(self, tensor: Tensor, stream: _CopyStream):
        self.stream, self.shape, self.dtype = stream, tensor.shape, tensor.dtype
        self._back: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._buffer: Tensor | None = None
        self._buffer = stream.buffer(tensor.nbytes)
        self._let_go = held_on_host("activations", tensor.nbytes)
        self.left = None if self._buffer is None else stream.copy(self._host(), tensor)

    def _host(self) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return self._buffer[:size].view(self.dtype).view(self.shape)

    def fetch(self) -> None:
        """Begin to copy it back."""
        if self._back is None:
            back = torch.empty(self.shape, dtype=self.dtype, device=self.stream.device)
            self._back = back, None if self._buffer is None else self.stream.copy(back, self._host())

    def take(self) -> Tensor:
        self.fetch()
        (back, arrived), self._back = self._back, None
        self.stream.wait(arrived)
        return back

    def __del__(self):
        if self._back is not None:  # a backward pass that was broken off: nobody has waited for the copy
            self.stream.wait(self._back[1])
        self.stream.give_back(self._buffer)
        self._let_go()


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """The hooks of one forward pass.

    Attributes:
        tensors, bytes: what was sent to host memory.
    """

    def __init__(self, keep: Iterable[Tensor], min_bytes: int):
        super().__init__(self._pack, self._unpack)
        self.tensors = self.bytes = 0
        self._keep = {t.untyped_storage()._cdata for t in keep}
        self._min_bytes = min_bytes
        self._order: list[weakref.ref[_Offloaded]] = []
        self._place: weakref.WeakKeyDictionary[_Offloaded, int] = weakref.WeakKeyDictionary()
        self._leaving: deque[tuple[_Offloaded, Tensor]] = deque()

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        worth = tensor.is_floating_point() and tensor.nbytes >= self._min_bytes
        if not worth or type(tensor) is not Tensor or tensor.untyped_storage()._cdata in self._keep:
            return tensor
        stream = _STREAMS.get(tensor.device)
        if stream is None:
            stream = _STREAMS[tensor.device] = _CopyStream(tensor.device)
        packed = _Offloaded(tensor, stream)
        self.tensors, self.bytes = self.tensors + 1, self.bytes + tensor.nbytes
        self._place[packed] = len(self._order)
        self._order.append(weakref.ref(packed))
        self._leaving.append((packed, tensor))
        self.settle(_IN_FLIGHT)
        return packed

    def settle(self, in_flight: int = 0) -> None:
        """Let go of all but the last tensors that are on their way out."""
        while len(self._leaving) > in_flight:
            packed, _ = self._leaving.popleft()
            packed.stream.wait(packed.left)

    def _unpack(self, packed: Tensor | _Offloaded) -> Tensor:
        if not isinstance(packed, _Offloaded):
            return packed
        tensor, place = packed.take(), self._place[packed]
        before = self._order[place - 1]() if place else None
        if before is not None:
            before.fetch()
        return tensor


@contextmanager
def offloaded_activations(
    enabled: bool, keep: Iterable[Tensor] = (), min_bytes: int | None = None
) -> Iterator[Offload | None]:
    """Put around a decoder's forward pass: what autograd saves in it goes to host memory until it is needed.

    Args:
        enabled: False is a context that does nothing.
        keep: parameters and buffers; what shares their memory is left alone.
        min_bytes: smaller tensors are left alone; MIN_BYTES if left out.

    Yields:
        the hooks, which count; None if not enabled.
    """
    if not enabled:
        yield None
        return
    hooks = Offload(keep, MIN_BYTES if min_bytes is None else min_bytes)
    try:
        with hooks if torch.is_grad_enabled() else nullcontext():
            yield hooks
    finally:
        hooks.settle()
