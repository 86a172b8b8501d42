"""Host memory that a GPU copies to and from without anybody waiting.

A copy between a GPU and pageable memory waits for all work that was queued before it. One from or to page-locked memory
is queued like any other work, and whoever is behind it on the same stream may rely on it; only the host must not read
such memory before the copy has ended. PyTorch's allocator of page-locked memory rounds each request up to a power of
two, and gives a piece out again only once the copies queued from it are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise

import torch
from torch import Tensor

_CHUNK = 2**25  # bytes: a power of two, see above
_GATHERED = 2**24  # bytes of small tensors that are packed on their device before they leave it
_ALIGN = 16


def host_buffer(size: int, *, pinned: bool) -> Tensor:
    """`size` bytes (uint8), page-locked if `pinned` and the system grants it (Windows limits it): any other memory does
    too, with copies that wait."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:
        if not pinned:
            raise
        return torch.empty(size, dtype=torch.uint8)


def locked_size(size: int) -> int:
    """Bytes that PyTorch takes for a piece of page-locked memory of `size` bytes."""
    return 1 << (size - 1).bit_length() if size > 1 else size


def spans(tensors: Sequence[Tensor], align: int = _ALIGN) -> tuple[list[int], int]:
    """Where each tensor begins if all are laid one after another, and the bytes of all of them."""
    ends = list(accumulate((-(-t.nbytes // align) * align for t in tensors), initial=0))
    return ends[:-1], ends[-1]


def placed(like: Tensor, flat: Tensor, start: int) -> Tensor:
    """A contiguous tensor of that dtype and shape in `flat` (uint8), from byte `start` on."""
    return flat[start : start + like.nbytes].view(like.dtype).view(like.shape)


def upload(tensors: Sequence[Tensor], device: torch.device, *, pack: bool | None = None) -> list[Tensor]:
    """Tensors of the host on `device`. If they are packed (for a GPU or meta, unless something else is said) they are
    contiguous and go in one copy that nobody waits for, into one piece of memory that lives as long as any of them."""
    if not (device.type != "cpu" if pack is None else pack):
        return [t.to(device) for t in tensors]
    starts, size = spans(tensors)
    staging = host_buffer(size, pinned=device.type == "cuda")
    for tensor, start in zip(tensors, starts):
        placed(tensor, staging, start).copy_(tensor)
    flat = staging.to(device, non_blocking=True)
    return [placed(tensor, flat, start) for tensor, start in zip(tensors, starts)]


class HostBytes:
    """Copies of tensors in host memory, page-locked where they come from a GPU, packed into chunks that serve again.

    From a GPU they come in few copies, on the current stream; nobody waits.
    """

    def __init__(self):
        self._chunks: list[Tensor] = []

    def keep(self, tensors: Sequence[Tensor]) -> list[range]:
        """Copy all of them, in place of what was kept before; for `put_back`, where each one's bytes are. Of tensors on
        meta nothing is kept."""
        real = [0 if t.is_meta else t.nbytes for t in tensors]
        starts = list(accumulate(real, initial=0))
        self._reach(starts[-1], pinned=any(t.is_cuda for t in tensors))
        kept = [range(*edge) for edge in pairwise(starts)]
        for group in self._gathered(tensors, kept):
            self._copy([_bytes(tensors[i]) for i in group], kept[group[0]].start)
        return kept

    @torch.no_grad()
    def put_back(self, tensor: Tensor, kept: range) -> None:
        """Write into `tensor` the bytes that it had, by copies that nobody waits for (unless it is not contiguous).
        Allocates nothing on a device."""
        pieces = list(self._pieces(kept))
        if not pieces:
            return
        if not tensor.is_contiguous():
            if tensor.is_cuda:  # the host reads here what the device may still be sending
                torch.cuda.current_stream(tensor.device).synchronize()
            tensor.copy_(torch.cat(pieces).view(tensor.dtype).view(tensor.shape))
            return
        into, at = _bytes(tensor), 0
        for piece in pieces:
            into[at : at + len(piece)].copy_(piece, non_blocking=True)
            at += len(piece)

    def _reach(self, size: int, pinned: bool) -> None:
        left = size - sum(map(len, self._chunks))
        while left > 0:
            self._chunks.append(host_buffer(min(_CHUNK, left), pinned=pinned))
            left -= len(self._chunks[-1])

    @staticmethod
    def _gathered(tensors: Sequence[Tensor], kept: Sequence[range]) -> Iterator[list[int]]:
        """Runs of neighbours on one device whose bytes are few enough to be packed there."""
        run: list[int] = []
        for i, place in enumerate(kept):
            if not len(place):
                continue
            fits = run and place.stop - kept[run[0]].start <= _GATHERED
            if run and not (fits and tensors[i].device == tensors[run[0]].device):
                yield run
                run = []
            run.append(i)
        if run:
            yield run

    def _copy(self, parts: list[Tensor], start: int) -> None:
        if len(parts) > 1:
            with suppress(torch.OutOfMemoryError):  # one by one, then
                parts = [torch.cat(parts)]
        for part in parts:
            at = 0
            for piece in self._pieces(range(start, start + len(part))):
                piece.copy_(part[at : at + len(piece)], non_blocking=True)
                at += len(piece)
            start += len(part)

    def _pieces(self, place: range) -> Iterator[Tensor]:
        """The host's bytes of that place, which may lie in several chunks."""
        begin = 0
        for chunk in self._chunks:
            a, b = max(place.start - begin, 0), min(place.stop - begin, len(chunk))
            if a < b:
                yield chunk[a:b]
            begin += len(chunk)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
