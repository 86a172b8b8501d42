"""What a masked run asked of the device that is not there, each with the line of code that asked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_OURS = (f"{ROOT}/lowvram_grpo/", f"{ROOT}/kernels/")
# Functions of their own before Python 3.12.
_INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>")
_MASK = (str(Path(__file__).parent),)


class CudaError(RuntimeError):
    """What CUDA would have raised, or a mistake that it would not have told."""


class Event(NamedTuple):
    """`what` the host did, and `where`: module:function of ours, behind it the library's if that one asked."""

    what: str
    where: str


@dataclass
class Record:
    """Counts since the last `clear`, and what goes on now.

    Attributes:
        syncs: the host waited for the device.
        copies: between host and device; those that wait stand among the syncs too.
        launches: operators that start work on the device (views and allocations do not), and Triton kernels, by name.
        graphs: how many launches each captured graph has.
        capturing: the graph that is being captured.
        debug: of torch.cuda.set_sync_debug_mode: 0, 1 (warn) or 2 (error).
        fault: called with an operator's name before it runs; may raise, as an allocation does.
    """

    syncs: list[Event] = field(default_factory=list)
    copies: list[Event] = field(default_factory=list)
    launches: Counter = field(default_factory=Counter)
    graphs: list[int] = field(default_factory=list)
    capturing: Any = None
    debug: int = 0
    fault: Callable[[str], None] | None = None

    def clear(self) -> None:
        self.syncs.clear()
        self.copies.clear()
        self.launches.clear()
        self.graphs.clear()

    def sync(self, what: str, *, seen_by_debug: bool = True) -> None:
        """The host waits. PyTorch's debug mode looks at copies and operators, not at cudaDeviceSynchronize and
        cudaEventSynchronize."""
        if self.capturing is not None:
            raise CudaError(f"CUDA error: operation not permitted when stream is capturing: {what} at {where()}")
        if self.debug == 2 and seen_by_debug:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what} at {where()}")
        self.syncs.append(Event(what, where()))

    def upload(self, pinned: bool, non_blocking: bool) -> None:
        kind = f"{'pinned' if pinned else 'pageable'} upload{', non-blocking' if non_blocking else ''}"
        if self.capturing is not None and not pinned:
            raise CudaError(f"a {kind} while capturing at {where()}")
        self.copies.append(Event(kind, where()))
        if not non_blocking:
            self.sync(kind)

    def download(self, non_blocking: bool) -> None:
        kind = f"download{', non-blocking' if non_blocking else ''}"
        self.copies.append(Event(kind, where()))
        if not non_blocking:
            self.sync(kind)


RECORD = Record()


def where() -> str:
    """The innermost function that is neither PyTorch's nor the mask's, and the innermost of ours around it."""
    library, frame = None, sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if frame.f_code.co_name in _INLINED:
            pass
        elif name.startswith(_OURS):
            ours = _place(name, frame.f_code.co_name)
            return f"{ours} ({library})" if library else ours
        elif library is None and not name.startswith(_MASK) and "/torch/" not in name and not name.startswith("<"):
            library = _place(name, frame.f_code.co_name)
        frame = frame.f_back
    return library or "?"


def _place(file: str, function: str) -> str:
    for root in (f"{ROOT}/lowvram_grpo/", f"{ROOT}/"):
        if file.startswith(root):
            return f"{file[len(root) :]}:{function}"
    return f"{file.rpartition('site-packages/')[2]}:{function}"
