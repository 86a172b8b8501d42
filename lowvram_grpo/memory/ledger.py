"""Counting the bytes that a piece of code holds, operator by operator, without a GPU.

Inside `with Ledger() as ledger`, every operator's output is asked for its storage; storages that were not there before
are counted until they are freed. On meta tensors nothing is computed, so a step on a model of any size takes seconds.
What an allocator adds (rounding, fragmentation) and what libraries keep for themselves is not in it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Ledger(TorchDispatchMode):
    """Bytes of storages made inside the context.

    Attributes:
        live: bytes that are held now.
        peak: the most that were held at once.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def ignore(self, *tensors: Tensor) -> None:
        """Leave these tensors out: they were there before."""
        for tensor in tensors:
            self._remember(tensor.untyped_storage(), 0)

    def _remember(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)

        def forget(_):
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in given:
                    self._remember(storage, storage.nbytes())
        return out
