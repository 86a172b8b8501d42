"""An optimizer step that can be taken back, and one that keeps its moments in host memory."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowvram_grpo.memory.guard import Guard

# Bytes of weights whose copy to host memory nobody notices: 10 to 20 ms over a card's bus.
_SMALL = 2**28


class GuardedStep:
    """Replaces `optimizer.step`: out of memory half-way through, weights and moments go back to what they were, and the
    step is done again.

    `offload` keeps the moments in host memory (pinned where there is CUDA) and brings them to the device one parameter
    at a time: slower by their way over the bus, the same numbers. It works for every optimizer that updates each
    parameter from that parameter's own state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, guard: Guard, *, offload: bool = False):
        self.optimizer, self.guard, self.offload = optimizer, guard, offload
        self._step = optimizer.step
        # A bound method, because learning-rate schedulers wrap `step.__func__`.
        optimizer.step = types.MethodType(lambda _, closure=None: self(closure), optimizer)

    def __call__(self, closure: Callable | None = None) -> Any:
        undo = self._memory() if self.guard.active and self._affordable() else None
        return self.guard.run("optimizer", lambda: self._offloaded() if self.offload else self._step(closure), undo)

    def _affordable(self) -> bool:
        """Copies of small weights cost nothing beside a step; of large ones only the first step's are made, which
        allocates the moments."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        small = sum(p.nbytes for p in weights) < _SMALL
        return small or any(p.grad is not None and p not in self.optimizer.state for p in weights)

    def _memory(self) -> Callable[[], None]:
        """Copies weights and moments to host memory; what it returns puts them back."""
        state = self.optimizer.state
        weights = [(p, _on_host(p)) for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            p: {k: (v, _on_host(v)) for k, v in state[p].items() if not _shared(k)} for p, _ in weights if p in state
        }

        @torch.no_grad()
        def undo() -> None:
            for p, copy in weights:
                p.copy_(copy)
                if p not in moments:
                    state.pop(p, None)
                    continue
                for key in set(state[p]) - set(moments[p]):
                    if not _shared(key):
                        del state[p][key]
                for key, (value, copy) in moments[p].items():
                    state[p][key] = value.copy_(copy) if isinstance(value, Tensor) else value

        return undo

    def _offloaded(self) -> None:
        groups = self.optimizer.param_groups
        try:
            for group in groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    self._move(p, p.device)
                    self.optimizer.param_groups = [{**group, "params": [p]}]
                    self._step()
                    self._move(p, torch.device("cpu"))
        finally:
            self.optimizer.param_groups = groups

    def settle(self) -> None:
        """Bring the moments to host memory where they belong there: after a checkpoint has put them on the device."""
        if self.offload:
            for p in list(self.optimizer.state):
                self._move(p, torch.device("cpu"))

    def _move(self, p: Tensor, device: torch.device) -> None:
        """Moments of `p`; scalars (step counts) stay where they are, and so do tables that all parameters share."""
        state = self.optimizer.state.get(p, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and not _shared(key):
                moved = value.to(device, non_blocking=device.type == "cuda")
                state[key] = moved.pin_memory() if device.type == "cpu" and p.is_cuda else moved


def _shared(key: str) -> bool:
    """bitsandbytes' tables of codes, one for all parameters and never changed."""
    return key.startswith("qmap")


def _on_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
