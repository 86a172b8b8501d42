"""Time, memory, and the card's own ceilings.

Times are those between two device events around one call, the queue empty before it, so that what the host does in
between (launches, a `.item()`) counts as it does in training. Before each call a buffer of twice the L2 cache is
written outside the events: nothing is read from a cache that a training step would have emptied. Peak memory is taken
in a call of its own, above what was allocated before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

_scratch: dict[torch.device, Tensor] = {}


def _empty_cache_lines(device: torch.device) -> None:
    if device not in _scratch:
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
        _scratch[device] = torch.empty(2 * l2, dtype=torch.int8, device=device)
    _scratch[device].zero_()


def timed(fn: Callable[[], object], device: torch.device, seconds: float, most: int = 50) -> dict[str, float]:
    """Median, 20th and 80th percentile of one call in ms, after warm-up."""
    cuda = device.type == "cuda"
    started = time.perf_counter()
    for _ in range(3 if cuda else 0):
        fn()
    if cuda:
        torch.cuda.synchronize()
    found: list[float] = []
    # However slow the warm-up was, three calls are measured. A CPU's one is a sign of life.
    while len(found) < (3 if cuda else 1) or (len(found) < most and time.perf_counter() - started < seconds):
        if cuda:
            _empty_cache_lines(device)
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            first.record()
            fn()
            last.record()
            torch.cuda.synchronize()
            found.append(first.elapsed_time(last))
        else:
            t = time.perf_counter()
            fn()
            found.append((time.perf_counter() - t) * 1e3)
    found.sort()
    at = lambda share: found[min(len(found) - 1, int(share * len(found)))]
    return {"ms_p20": at(0.2), "ms": at(0.5), "ms_p80": at(0.8), "calls": len(found)}


def peak_mib(fn: Callable[[], object], device: torch.device) -> float | None:
    """Peak allocated MiB of one call above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def matmul_ceiling(hidden: Tensor, weight: Tensor, seconds: float) -> dict[str, float]:
    """What the BLAS makes of hidden (N, H) @ weight (V, H)^T into its own dtype: the shape that every provider has to
    multiply. V is cut where the product would take more than a quarter of the free memory."""
    columns = len(weight)
    if hidden.is_cuda:
        free = torch.cuda.mem_get_info()[0]
        columns = min(columns, free // 4 // (len(hidden) * hidden.element_size()))
    out = hidden.new_empty(len(hidden), columns)
    w = weight[:columns].T
    found = timed(lambda: torch.mm(hidden, w, out=out), hidden.device, seconds)
    return {**found, "columns": columns, "tflops": 2 * out.numel() * hidden.shape[1] / found["ms"] / 1e9}


def copy_ceiling(device: torch.device, seconds: float, size: int = 2**30) -> dict[str, float]:
    """Bytes a second, read and written, of a copy of `size` bytes on the device."""
    source = torch.ones(size, dtype=torch.int8, device=device)
    into = torch.empty_like(source)
    found = timed(lambda: into.copy_(source), device, seconds)
    return {**found, "gbs": 2 * size / found["ms"] / 1e6}


def read_ceiling(device: torch.device, seconds: float, size: int = 2**30) -> dict[str, float]:
    """Bytes a second of a sum over `size` bytes, which only reads."""
    source = torch.ones(size // 4, device=device)
    found = timed(source.sum, device, seconds)
    return {**found, "gbs": size / found["ms"] / 1e6}
