"""An optimizer's moments in host memory, on the device only for the parameters that are being updated.

The moments of as many parameters as fit `_BATCH` bytes have one piece of page-locked memory as their home and go to the
device and back in one copy each, queued on the compute stream: nobody waits. It works for every optimizer that updates
each parameter from that parameter's own state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowvram_grpo.memory.host import host_buffer, placed, spans
from lowvram_grpo.memory.ledger import held_on_host

_BATCH = 2**24
_ALIGN = 256  # bytes: bitsandbytes' kernels read several elements at once


def shared(key: str) -> bool:
    """bitsandbytes' tables of codes, one for all parameters and never changed."""
    return key.startswith("qmap")


class HostMoments:
    """The moments of `optimizer`; scalars (step counts) and what all parameters share stay where they are."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._homes: dict[tuple[int, ...], Tensor] = {}
        self._let_go: dict[tuple[int, ...], Callable[[], None]] = {}
        self._landed: torch.cuda.Event | None = None
        optimizer.register_state_dict_post_hook(self._plain)

    def step(self, step: Callable[[], Any]) -> None:
        """What `step` does, some parameters at a time: the others have no gradient meanwhile."""
        self._prepare()
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        try:
            for p in params:
                p.grad = None
            for first, last in self._batches(params):
                batch = params[first:last]
                flat = self._fetch(batch)
                for p, grad in zip(batch, grads[first:last]):
                    p.grad = grad
                step()
                for p in batch:
                    p.grad = None
                self._park(batch, flat)
        finally:
            for p, grad in zip(params, grads):
                p.grad = grad

    def park(self) -> None:
        """Bring all moments to host memory, wherever they are."""
        self._wait()
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p in self.optimizer.state]
        for first, last in self._batches(params):
            self._park(params[first:last])

    def _prepare(self) -> None:
        # bitsandbytes would bring all moments to the device in its first step.
        if getattr(self.optimizer, "initialized", True) is False and hasattr(self.optimizer, "check_overrides"):
            self.optimizer.check_overrides()
            self.optimizer.initialized = True

    def _batches(self, params: list[Tensor]) -> Iterator[tuple[int, int]]:
        first = size = 0
        for i, p in enumerate(params):
            own = sum(value.nbytes for *_, value in self._items([p])) or 8 * p.numel()
            if i > first and (size + own > _BATCH or p.device != params[first].device):
                yield first, i
                first, size = i, 0
            size += own
        if len(params) > first:
            yield first, len(params)

    def _items(self, batch: list[Tensor]) -> list[tuple[dict[str, Any], str, Tensor]]:
        states = (self.optimizer.state[p] for p in batch if p in self.optimizer.state)
        return [
            (state, key, value)
            for state in states
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim() and not shared(key)
        ]

    def _fetch(self, batch: list[Tensor]) -> Tensor:
        """The piece of the device's memory that holds a batch's moments from now on."""
        make = lambda size: torch.empty(size, dtype=torch.uint8, device=batch[0].device)
        return self._move(batch, self._homes.get(_name(batch)), make)

    def _park(self, batch: list[Tensor], flat: Tensor | None = None) -> None:
        """`flat`: what `_fetch` returned."""

        def home(size: int) -> Tensor:
            mine = self._homes.get(_name(batch))
            if mine is None or len(mine) != size:
                # Other batches than before: theirs go once nobody's moments lie in them.
                for name in [name for name in self._homes if not {*name}.isdisjoint(_name(batch))]:
                    del self._homes[name]
                    self._let_go.pop(name)()
                mine = self._homes[_name(batch)] = host_buffer(size, pinned=batch[0].is_cuda)
                self._let_go[_name(batch)] = held_on_host("moments", size)
            return mine

        self._move(batch, flat, home)
        if batch[0].is_cuda:
            self._landed = torch.cuda.current_stream(batch[0].device).record_event()

    @torch.no_grad()
    def _move(self, batch: list[Tensor], source: Tensor | None, make: Callable[[int], Tensor]) -> Tensor:
        """The moments of a batch, packed, into what `make` makes for so many bytes; in one copy if all of them lie in
        `source` like that."""
        items = self._items(batch)
        starts, size = spans([value for *_, value in items], _ALIGN)
        flat = make(size)
        if source is not None and source.data_ptr() == flat.data_ptr():
            return flat
        if source is not None and _packed(items, starts, size, source):
            flat.copy_(source, non_blocking=True)
        else:  # a first step's moments, or a checkpoint's
            for (*_, value), start in zip(items, starts):
                placed(value, flat, start).copy_(value, non_blocking=True)
        for (state, key, value), start in zip(items, starts):
            state[key] = placed(value, flat, start)
        return flat

    def _wait(self) -> None:
        """Until the host may read what was parked last; that is long ago."""
        if self._landed is not None:
            self._landed.synchronize()

    def _plain(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """A checkpoint's moments are tensors of their own."""
        if not self._homes:
            return
        self._wait()
        own = lambda key, x: x.clone() if isinstance(x, Tensor) and x.device.type == "cpu" and not shared(key) else x
        for name, state in saved["state"].items():
            saved["state"][name] = {key: own(key, value) for key, value in state.items()}


def _name(batch: list[Tensor]) -> tuple[int, ...]:
    return tuple(map(id, batch))


def _packed(items: list[tuple[dict[str, Any], str, Tensor]], starts: list[int], size: int, source: Tensor) -> bool:
    if len(source) != size:
        return False
    at = source.data_ptr()
    return all(x.is_contiguous() and x.data_ptr() == at + start for (*_, x), start in zip(items, starts))
