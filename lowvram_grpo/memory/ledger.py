"""Counting the bytes that a piece of code holds, operator by operator, without a GPU.

Inside `with Ledger() as ledger`, every operator's output is asked for its storage; storages that were not there before
are counted until they are freed. On meta tensors nothing is computed, so a step on a model of any size takes seconds.
Each storage has a category, each peak belongs to a phase. What an allocator adds beyond rounding up to its blocks, and
what libraries keep for themselves, is not in it: see `overheads`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# In the order in which tables show them. Whatever is not tagged is an activation.
CATEGORIES = (
    "base weights",
    "head",
    "adapter",
    "streamed weights",
    "reference",
    "gradients",
    "optimizer",
    "KV cache",
    "recurrent states",
    "workspace",
    "activations",
)
ACTIVATIONS = "activations"


@dataclass
class Peak:
    """The most bytes held at once, and what they were.

    Attributes:
        bytes: in all.
        categories: of them, by category.
    """

    bytes: int = 0
    categories: dict[str, int] = field(default_factory=dict)


class _Entry:
    __slots__ = ("category", "ref", "size")

    def __init__(self, ref: Any, size: int, category: str):
        self.ref, self.size, self.category = ref, size, category


_counting: list[Ledger] = []


def counted_as(category: str) -> AbstractContextManager:
    """What is made inside belongs to `category` of the ledger that is counting; nothing where none is."""
    return _counting[-1].making(category) if _counting else nullcontext()


def held_on_host(category: str, size: int, locked: bool = True) -> Callable[[], None]:
    """Count a piece of `size` bytes of host memory (`weights`, `activations`, ...) in the ledger that counts, apart
    from the device's; what is returned ends it. Nothing where no ledger is.

    Args:
        locked: it is page-locked where there is CUDA.
    """
    return _counting[-1].hold_on_host(category, size, locked) if _counting else lambda: None


class Ledger(TorchDispatchMode):
    """Bytes of storages made inside the context.

    Args:
        block: sizes are rounded up to multiples of it (512 in CUDA's caching allocator).
        device: type of the device whose memory is counted; all if left out.
        hidden: of (operator, its arguments), the bytes that it makes for itself and frees before it returns.
        locked: of a piece of host memory, the bytes that are taken for it where it is page-locked.

    Attributes:
        live: bytes that are held now.
        phases: the peak of each phase, by name.
        host: the most bytes of host memory that were held at once, by category, as far as whoever keeps them says so
            (`held_on_host`); no part of `live` and `phases`.
    """

    def __init__(
        self,
        *,
        block: int = 1,
        device: str | None = None,
        hidden: Callable[[Any, tuple], int] = lambda func, args: 0,
        locked: Callable[[int], int] = lambda size: size,
    ):
        super().__init__()
        self.block, self.device, self.hidden, self.locked = block, device, hidden, locked
        self.live = 0
        self.phases: dict[str, Peak] = {}
        self.host: dict[str, int] = {}
        self._on_host: dict[str, int] = {}
        self._held: dict[str, int] = {}
        self._known: dict[int, _Entry] = {}
        self._whole = self._peak = Peak()
        self._category = ACTIVATIONS

    def __enter__(self) -> Ledger:
        _counting.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _counting.remove(self)
        super().__exit__(*error)

    @property
    def peak(self) -> int:
        """The most bytes that were held at once, over all phases."""
        return max(self._whole.bytes, *(peak.bytes for peak in self.phases.values()), 0)

    @property
    def categories(self) -> dict[str, int]:
        """Bytes that are held now, by category."""
        return {name: size for name, size in self._held.items() if size}

    def hold_on_host(self, category: str, size: int, locked: bool = True) -> Callable[[], None]:
        """See `held_on_host`."""
        size = self.locked(size) if locked else size
        left = [size]

        def add(more: int) -> None:
            self._on_host[category] = self._on_host.get(category, 0) + more
            self.host[category] = max(self.host.get(category, 0), self._on_host[category])

        def end() -> None:
            add(-left[0])
            left[0] = 0

        add(size)
        return end

    def ignore(self, *tensors: Tensor) -> None:
        """Leave these tensors out: they were there before, or are not in the device's memory."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._known.get(id(storage))
            if known is None:
                self._remember(storage, 0, ACTIVATIONS)
            else:
                self._add(-known.size, known.category)
                known.size = 0

    def tag(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors as `category` from now on; those that are not known are counted from now on too."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._known.get(id(storage))
            if known is None:
                self._remember(storage, self._rounded(storage), category)
            elif known.category != category:
                self._add(-known.size, known.category)
                known.category = category
                self._add(known.size, category)

    @contextmanager
    def phase(self, name: str) -> Iterator[Peak]:
        """Peaks inside the block belong to the phase `name`; it may be entered several times."""
        outer, self._peak = self._peak, self.phases.setdefault(name, Peak())
        self._look()
        try:
            yield self._peak
        finally:
            self._peak = outer

    def cut(self, name: str) -> None:
        """What the current phase has been so far becomes the phase `name`; the current one begins anew."""
        before = self._peak
        self.phases[name] = Peak(before.bytes, before.categories)
        before.bytes, before.categories = 0, {}
        self._look()

    @contextmanager
    def making(self, category: str) -> Iterator[None]:
        """Storages made inside the block are of `category`."""
        outer, self._category = self._category, category
        try:
            yield
        finally:
            self._category = outer

    def _rounded(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self.block) * self.block

    def _add(self, size: int, category: str) -> None:
        self.live += size
        self._held[category] = self._held.get(category, 0) + size

    def _look(self) -> None:
        if self.live > self._peak.bytes:
            self._peak.bytes, self._peak.categories = self.live, dict(self._held)

    def _remember(self, storage: torch.UntypedStorage, size: int, category: str) -> None:
        key = id(storage)

        def forget(_: Any) -> None:
            entry = self._known.pop(key)
            self._add(-entry.size, entry.category)

        self._known[key] = _Entry(weakref.ref(storage, forget), size, category)
        self._add(size, category)
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = None
        for tensor in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if not isinstance(tensor, Tensor) or self.device not in (None, tensor.device.type):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self._known:
                continue
            if given is None:
                given = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
            if id(storage) not in given:
                self._remember(storage, self._rounded(storage), self._category)
        if hidden := self.hidden(func, args):
            self._add(hidden, ACTIVATIONS)
            self._look()
            self._add(-hidden, ACTIVATIONS)
        return out
