"""A frozen model that lives in host memory and comes to a device for a moment."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.memory.host import host_buffer, placed, spans


class Visitor:
    """Moves `model` to host memory, page-locked where `device` is a GPU. Inside the context its parameters and buffers
    are on `device`. They do not change there, so nothing comes back."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.device, self._slots = device, _in_host_memory(model, pinned=device.type == "cuda")

    def __enter__(self) -> None:
        try:
            there = {id(slot.home): slot.like(slot.home.to(self.device, non_blocking=True)) for slot in self._slots}
            for slot in self._slots:
                slot.table[slot.name] = there[id(slot.home)]
        except BaseException:  # there was no room
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        for slot in self._slots:
            slot.table[slot.name] = slot.home
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # pieces of sizes that are of no use to the policy


class _Slot(NamedTuple):
    """Where a module looks a parameter or a buffer up, and the tensor on the host that belongs there: one for all that
    are tied."""

    table: dict[str, Any]
    name: str
    home: Tensor

    def like(self, tensor: Tensor) -> Tensor:
        return nn.Parameter(tensor, requires_grad=False) if isinstance(self.home, nn.Parameter) else tensor


def _in_host_memory(model: nn.Module, *, pinned: bool) -> list[_Slot]:
    """All parameters and buffers, moved to one piece of host memory."""
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    slots = [_Slot(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]
    tensors = {id(slot.home): slot.home for slot in slots}
    starts, size = spans(list(tensors.values()))
    flat, homes = host_buffer(size, pinned=pinned), {}
    for (key, tensor), start in zip(tensors.items(), starts):
        home = placed(tensor, flat, start)
        home.copy_(tensor.detach())
        homes[key] = nn.Parameter(home, requires_grad=False) if isinstance(tensor, nn.Parameter) else home
    for table, name, tensor in slots:
        table[name] = homes[id(tensor)]
    return [slot._replace(home=homes[id(slot.home)]) for slot in slots]
