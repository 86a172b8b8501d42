"""torch.cuda of a card that is not there: its properties, streams, events, graphs and memory."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections import defaultdict
from typing import Any

import torch

from tests.masked_cuda.device import DEVICE, live_bytes
from tests.masked_cuda.record import RECORD, CudaError, where

# (name, multiprocessors, bytes of shared memory a block may ask for) by compute capability.
CARDS = {
    (7, 5): ("Masked RTX 2060 SUPER", 34, 65_536),
    (8, 6): ("Masked RTX 3070", 46, 101_376),
    (9, 0): ("Masked H100", 132, 232_448),
}
MEMORY = 8 * 2**30
_ids = itertools.count(1)


class Stream:
    def __init__(self, device=None, priority=0, **_):
        self.device, self.cuda_stream = DEVICE, next(_ids)
        self.stream_id, self.device_index, self.device_type = self.cuda_stream, 0, 1

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        RECORD.sync("Stream.synchronize", seen_by_debug=False)

    def query(self):
        return True

    def wait_stream(self, other): ...
    def wait_event(self, event): ...

    def __eq__(self, other):
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self):
        return self.cuda_stream

    def __enter__(self):
        CURRENT.append(self)
        return self

    def __exit__(self, *_):
        CURRENT.pop()


class Event:
    def __init__(self, *_, **__): ...
    def record(self, stream=None): ...
    def wait(self, stream=None): ...

    def query(self):
        return True

    def synchronize(self):
        RECORD.sync("Event.synchronize", seen_by_debug=False)

    def elapsed_time(self, other):
        return 1.0


DEFAULT = Stream()
CURRENT = [DEFAULT]


class CUDAGraph:
    """A tape of what was captured. `replay` runs it on the same tensors."""

    def __init__(self, keep_graph=False):
        self.steps: list[tuple[str, Any]] = []
        self.works = self.replays = 0
        self._pool, self._kept, self._saved, self._fresh = object(), [], {}, set()

    def pool(self):
        return self._pool

    def add(self, name, again, *, works=True) -> None:
        self.steps.append((name, again))
        self.works += works

    def keep(self, *written: torch.Tensor) -> None:
        """What is written to memory that was there before the capture is put back at its end: nothing has run."""
        for storage in (x.untyped_storage() for x in written):
            at = storage.data_ptr()
            if at not in self._saved and at not in self._fresh:
                self._saved[at] = storage, storage.clone()

    def made(self, *tensors: torch.Tensor, given=()) -> None:
        """Tensors of the graph's own; they stay where they are for as long as the graph is there."""
        there = {x.untyped_storage().data_ptr() for x in given}
        for x in tensors:
            if x.untyped_storage().data_ptr() not in there:
                self._fresh.add(x.untyped_storage().data_ptr())
                self._kept.append(x)

    def end(self) -> None:
        for storage, before in self._saved.values():
            storage.copy_(before)
        self._saved.clear()

    def replay(self):
        if RECORD.capturing is not None:
            raise CudaError(f"a graph replayed while another is captured at {where()}")
        self.replays += 1
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            for _, again in self.steps:
                again()
        RECORD.launches["graph"] += 1

    def reset(self):
        self.steps.clear()


class graph:
    """Of torch.cuda: like it, it leaves the stream as it was only where the block ends well."""

    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global", **_):
        self.cuda_graph = cuda_graph

    def __enter__(self):
        RECORD.sync("capture_begin", seen_by_debug=False)
        RECORD.capturing = self.cuda_graph
        CURRENT.append(Stream())

    def __exit__(self, kind, *_):
        RECORD.capturing = None
        self.cuda_graph.end()
        RECORD.graphs.append(self.cuda_graph.works)
        if kind is None:
            CURRENT.pop()


class _StreamContext:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        if self.stream is not None:
            CURRENT.append(self.stream)

    def __exit__(self, *_):
        if self.stream is not None:
            CURRENT.pop()


class _Nothing(contextlib.nullcontext):
    def __init__(self, *_, **__):
        super().__init__()


def put(capability: tuple[int, int]) -> None:
    """Make torch.cuda that of one card of this compute capability."""
    name, processors, shared = CARDS[capability]
    properties = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=processors, total_memory=MEMORY,
        uuid="00000000-0000-0000-0000-000000000000", is_integrated=False, gcnArchName="", L2_cache_size=2**22,
        warp_size=32, shared_memory_per_block_optin=shared, regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=1_024 if capability == (7, 5) else 1_536,
    )  # fmt: skip
    nothing = lambda *_, **__: None
    always = lambda value: lambda *_, **__: value
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": always(True), "is_initialized": always(True), "_is_compiled": always(True),
        "_is_in_bad_fork": always(False), "device_count": always(1), "current_device": always(0),
        "get_device_capability": always(capability), "get_device_properties": always(properties),
        "get_device_name": always(name), "get_arch_list": always(["sm_75", "sm_86", "sm_90"]),
        # As PyTorch's own: it says yes to emulation.
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability[0] >= 8,
        "current_stream": lambda device=None: CURRENT[-1], "default_stream": always(DEFAULT),
        "set_stream": lambda stream: CURRENT.__setitem__(slice(None), [stream]), "stream": _StreamContext,
        "StreamContext": _StreamContext, "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph,
        "synchronize": lambda device=None: RECORD.sync("synchronize", seen_by_debug=False),
        "is_current_stream_capturing": lambda: RECORD.capturing is not None, "empty_cache": _empty_cache,
        "get_sync_debug_mode": lambda: RECORD.debug, "set_sync_debug_mode": _set_debug,
        "get_rng_state": lambda device=None: state.clone(), "get_rng_state_all": lambda: [state.clone()],
        "memory_stats": lambda device=None: defaultdict(int), "mem_get_info": always((MEMORY - 2**29, MEMORY)),
        **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"),
                        lambda device=None: live_bytes()),
        **dict.fromkeys(("_lazy_init", "init", "set_device", "ipc_collect", "reset_peak_memory_stats",
                         "set_per_process_memory_fraction", "set_rng_state", "set_rng_state_all", "manual_seed",
                         "manual_seed_all", "seed", "seed_all", "reset_accumulated_memory_stats"), nothing),
        **dict.fromkeys(("device", "device_of", "_DeviceGuard"), _Nothing),
    }  # fmt: skip
    for place in (torch.cuda, torch.cuda.random, torch.cuda.graphs, torch.cuda.memory):
        for key, answer in answers.items():
            if place is torch.cuda or hasattr(place, key):
                setattr(place, key, answer)
    torch.version.cuda = "12.8"


def _empty_cache() -> None:
    if RECORD.capturing is not None:
        raise CudaError(f"empty_cache while capturing at {where()}")


def _set_debug(mode) -> None:
    RECORD.debug = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
