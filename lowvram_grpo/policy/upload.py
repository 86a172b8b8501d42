"""What the host knows goes to the device in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`parts` (int64, on the host, of any shapes) as views of one int64 tensor on `device`.

    For a CUDA device they are packed into pinned memory and copied without blocking: from pageable memory CUDA copies
    only when all earlier work is done, and the host waits. The pinned buffer may be let go here: its block belongs to
    PyTorch's caching host allocator, which notes the stream of each non-blocking copy and gives a block out again only
    when its copies have run.
    """
    sizes = [part.numel() for part in parts]
    packed = torch.empty(sum(sizes), dtype=torch.long, device="cpu", pin_memory=device.type == "cuda")
    if parts:
        torch.cat([part.flatten() for part in parts], out=packed)
    there = packed.to(device, non_blocking=True).split(sizes)
    return [at.view(part.shape) for at, part in zip(there, parts)]


def runs(pairs: Sequence[tuple[int, int]]) -> Tensor:
    """(sum of lengths,) int64 on the host: start, start + 1, ... for each (start, length), one after another."""
    found = [torch.arange(start, start + n, device="cpu") for start, n in pairs]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long, device="cpu")
