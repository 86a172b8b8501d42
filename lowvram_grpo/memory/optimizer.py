"""An optimizer step that can be taken back, and one that keeps its moments in host memory."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowvram_grpo.memory.guard import Guard
from lowvram_grpo.memory.host import HostBytes
from lowvram_grpo.memory.moments import HostMoments, shared

# Bytes of weights whose copy to host memory nobody notices: 10 to 20 ms over a card's bus.
_SMALL = 2**28


class GuardedStep:
    """Replaces `optimizer.step`: out of memory half-way through, weights and moments go back to what they were, and the
    step is done again.

    `offload` keeps the moments in host memory (page-locked where there is CUDA) and brings them to the device some
    parameters at a time: slower by their way over the bus, the same numbers; see `moments.py`. Copies are queued on the
    compute stream, so no step waits for the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, guard: Guard, *, offload: bool = False):
        self.optimizer, self.guard, self.offload = optimizer, guard, offload
        self._step = optimizer.step
        self._moments, self._kept = HostMoments(optimizer), HostBytes()
        # A bound method, because learning-rate schedulers wrap `step.__func__`.
        optimizer.step = types.MethodType(lambda _, closure=None: self(closure), optimizer)

    def __call__(self, closure: Callable | None = None) -> Any:
        # With moments in host memory there is nothing left that a second attempt could give up.
        undo = self._memory() if self.guard.active and not self.offload and self._affordable() else None
        return self.guard.run("optimizer", lambda: self._attempt(closure), undo)

    def _attempt(self, closure: Callable | None) -> Any:
        with _queued(self.optimizer):
            return self._moments.step(self._step) if self.offload else self._step(closure)

    def _affordable(self) -> bool:
        """Copies of small weights cost nothing beside a step; of large ones only the first step's are made, which
        allocates the moments."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        small = sum(p.nbytes for p in weights) < _SMALL
        return small or any(p.grad is not None and p not in self.optimizer.state for p in weights)

    def _memory(self) -> Callable[[], None]:
        """Copies weights and moments to host memory; what it returns puts them back."""
        state = self.optimizer.state
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = {p: {k: v for k, v in state[p].items() if not shared(k)} for p in weights if p in state}
        places = [(p, k) for p, own in before.items() for k, v in own.items() if _on_device(v)]
        kept = self._kept.keep([*weights, *(before[p].pop(k) for p, k in places)])
        # What lies on the host is small, or managed by bitsandbytes, which has waited for it.
        before = {
            p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()} for p, own in before.items()
        }
        moments = {p: {} for p in before}
        for (p, k), place in zip(places, kept[len(weights) :]):
            moments[p][k] = place

        @torch.no_grad()
        def undo() -> None:
            for p, place in zip(weights, kept):
                self._kept.put_back(p, place)
                if p not in before:
                    state.pop(p, None)
                    continue
                for key in [k for k in state[p] if k not in before[p] and k not in moments[p] and not shared(k)]:
                    del state[p][key]
                for key, place in moments[p].items():
                    self._kept.put_back(state[p][key], place)
                for key, value in before[p].items():
                    state[p][key] = state[p][key].copy_(value) if isinstance(value, Tensor) else value

        return undo

    def settle(self) -> None:
        """Bring the moments to host memory where they belong there: after a checkpoint has put them on the device."""
        if self.offload:
            self._moments.park()


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


@contextmanager
def _queued(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """bitsandbytes waits for the device after each parameter. Its kernels run on the default stream, so there they are
    in order without that; paged moments, which the host may touch, are waited for at the end."""
    module = sys.modules.get("bitsandbytes.optim.optimizer")
    wait = getattr(module, "sync_gpu", None)
    theirs = wait is not None and isinstance(optimizer, module.Optimizer8bit)
    if not theirs or (torch.cuda.is_available() and torch.cuda.current_stream() != torch.cuda.default_stream()):
        yield
        return
    module.sync_gpu = lambda tensor: None
    try:
        yield
        if optimizer.is_paged:
            for p in optimizer.param_groups[0]["params"][:1]:
                wait(p)
    finally:
        module.sync_gpu = wait
