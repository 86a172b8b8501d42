"""A frozen model whose weights wait in host memory and visit the device layer by layer.

A pass holds two decoder layers on the device: while one computes, the next arrives on a stream of its own. A layer's
weights lie packed in one piece of host memory, page-locked where there is CUDA, so a visit is one copy that nobody
waits for; between passes nothing of a layer is on the device. Of the two tables, lm_head is read tile by tile by the
sweep (`kernels.head.Head`), and the input embedding gives the rows of its tokens, for which the host must see the ids:
one wait a pass. What is left (norms outside of the layers) stays on the device.

A slot is written again only behind the event that its last reader recorded, a layer computes only behind the event of
its copy, and the slots are freed once the compute stream has waited for every copy: the allocator never sees memory
that the other stream still touches.

The same code runs on a CPU (copies to other memory, the same bits) and on meta, where a ledger sees the two slots and
nothing of what lies in host memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import psutil  # comes with accelerate
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.modeling_layers import GradientCheckpointingLayer

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.host import host_buffer, placed, spans
from lowvram_grpo.memory.ledger import counted_as

#: Page-locked memory comes in powers of two; as many neighbouring layers share a piece as leave least of it unused.
_TOGETHER = 8
_ALIGN = 256  # bytes: kernels read several numbers at once
_GIB = 2**30


def copy_on_host(model: nn.Module) -> nn.Module:
    """A copy of `model` with its parameters in host memory, of which the device never holds a second one.

    Raises:
        UserError: the host has not that much memory.
    """
    _check_room(model)
    memo: dict[int, Any] = {id(p): nn.Parameter(_at_home(p), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _at_home(tensor: Tensor) -> Tensor:
    """A copy in host memory, which on meta is meta that no ledger counts."""
    with _disable_current_modes():
        home = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta" if tensor.is_meta else "cpu")
        return home.copy_(tensor.detach())


def _check_room(model: nn.Module) -> None:
    """Before a system begins to swap. What lies in host memory already needs no more room."""
    need = sum(p.nbytes for p in model.parameters() if p.device.type not in ("cpu", "meta"))
    free = psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"reference_offload keeps {need / _GIB:.1f} GiB of the reference in host memory, of which "
            f"{free / _GIB:.1f} GiB are free; close other programs, or train a LoRA adapter, whose reference shares "
            "the policy's weights."
        )


class _Layer:
    """A decoder layer: its weights packed at home, and where in its modules they belong."""

    def __init__(self, module: nn.Module, shared: set[int]):
        places = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]
        self.places = [place for place in places if id(place[2]) not in shared]
        self.weights = list({id(p): p for *_, p in self.places}.values())
        self.starts, self.bytes = spans(self.weights, _ALIGN)
        self.home = torch.empty(0, dtype=torch.uint8)

    def settle(self, home: Tensor) -> None:
        """Move in: `home` is uint8 host memory of `bytes`."""
        with _disable_current_modes():
            at_home = {}
            for weight, start in zip(self.weights, self.starts):
                at_home[id(weight)] = nn.Parameter(placed(weight, home, start).copy_(weight.detach()), False)
        self.places = [(module, name, at_home[id(p)]) for module, name, p in self.places]
        self.weights, self.home = list(at_home.values()), home

    def visit(self, flat: Tensor) -> None:
        """Compute with the weights in `flat` (uint8, on the device), which are there or will be."""
        there = {id(w): placed(w, flat, start) for w, start in zip(self.weights, self.starts)}
        for module, name, weight in self.places:
            module._parameters[name] = there[id(weight)]

    def leave(self) -> None:
        for module, name, weight in self.places:
            module._parameters[name] = weight


class _Window:
    """Two slots on the device, and which layers are in them."""

    def __init__(self, layers: list[_Layer], device: torch.device):
        self.layers, self.device = layers, device
        size = max(layer.bytes for layer in layers)
        with counted_as("reference"):
            self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]
        self._stream = _copy_stream(device) if device.type == "cuda" else None
        self._free = [self._now(), self._now()]
        self._arrived: list[Any] = [None, None]
        self.fetch(0)
        self.fetch(1)

    def _now(self) -> Any:
        """An event behind all that the compute stream has been given so far."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def fetch(self, i: int) -> None:
        """Begin to copy layer `i` into its slot; nothing where it is there, or where there is no such layer."""
        slot = i % 2
        if i >= len(self.layers) or self._held[slot] == i:
            return
        layer = self.layers[i]
        self._held[slot] = None  # should the copy fail
        if self._stream is None:
            self._slots[slot][: layer.bytes].copy_(layer.home)
        else:
            self._stream.wait_event(self._free[slot])
            with torch.cuda.stream(self._stream):
                self._slots[slot][: layer.bytes].copy_(layer.home, non_blocking=True)
                self._arrived[slot] = self._stream.record_event()
        self._held[slot] = i

    def enter(self, i: int) -> Tensor:
        """The bytes of layer `i`, behind whose arrival the compute stream now waits."""
        self.fetch(i)
        self._wait(i % 2)
        self.fetch(i + 1)
        return self._slots[i % 2]

    def exit(self, i: int) -> None:
        """Layer `i` has been given all its work."""
        self._free[i % 2] = self._now()
        self.fetch(i + 2)

    def _wait(self, slot: int) -> None:
        if self._arrived[slot] is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])

    def close(self) -> None:
        """Whatever comes into this memory next comes behind every copy."""
        for slot in range(2):
            self._wait(slot)


_STREAMS: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


class Streamed:
    """Moves the weights of `model` to host memory, and from there into each pass. The model's modules, their names and
    the order of its parameters stay.

    Args:
        model: causal language model in evaluation mode that nobody trains; its weights may be anywhere.
        device: where it is to compute.

    Attributes:
        locked: whether all layers lie in page-locked memory; from other memory copies wait (on a CPU, always True).

    Raises:
        UserError: its layers are not known as such, or the host has not that much memory.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device, self.locked = device, True
        self._window: _Window | None = None
        modules = _layers_of(model)
        self._layers = [_Layer(module, _shared(modules)) for module in modules]
        _check_room(model)
        for group in self._together():
            *starts, size = accumulate((layer.bytes for layer in group), initial=0)
            with _disable_current_modes():
                piece = _piece(size, device)
            self.locked &= device.type != "cuda" or piece.is_pinned()
            for layer, start in zip(group, starts):
                layer.settle(piece[start : start + layer.bytes])
                layer.leave()
        self._place_the_rest(model)
        for i, module in enumerate(modules):
            module.register_forward_pre_hook(partial(self._enter, i))
            module.register_forward_hook(partial(self._exit, i), always_call=True)

    @property
    def bytes(self) -> int:
        """Of the layers' weights, which every pass moves to the device."""
        return sum(layer.bytes for layer in self._layers)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Layers arrive ahead of their use in passes inside the block."""
        self._window = _Window(self._layers, self.device)
        try:
            yield
        finally:
            self._window.close()
            self._window = None

    def _enter(self, i: int, module: nn.Module, args: tuple) -> None:
        layer = self._layers[i]
        if self._window is not None:
            layer.visit(self._window.enter(i))
        else:  # somebody calls the model by itself
            layer.visit(layer.home.to(self.device))

    def _exit(self, i: int, module: nn.Module, args: tuple, output: Any) -> None:
        self._layers[i].leave()
        if self._window is not None:
            self._window.exit(i)

    def _together(self) -> Iterator[list[_Layer]]:
        """Neighbouring layers whose weights share a piece of host memory."""
        size = max(1, round(sum(layer.bytes for layer in self._layers) / len(self._layers)))
        waste = lambda n: (1 << (n * size - 1).bit_length()) / (n * size)
        count = min(range(1, min(_TOGETHER, len(self._layers)) + 1), key=waste)
        edges = [*range(0, len(self._layers), count), len(self._layers)]
        yield from (self._layers[a:b] for a, b in pairwise(edges))

    def _place_the_rest(self, model: nn.Module) -> None:
        inside = {id(p) for layer in self._layers for p in layer.weights}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tables = {id(m.weight) for m in (embedding, head) if getattr(m, "weight", None) is not None}
        moved: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is None or id(p) in inside:
                    continue
                if id(p) not in moved:
                    at = _at_home(p) if id(p) in tables else p.detach().to(self.device)
                    moved[id(p)] = nn.Parameter(at, requires_grad=False)
                module._parameters[name] = moved[id(p)]
            for name, buffer in module._buffers.items():
                # A scale on the embedding's rows is applied where they are gathered.
                if buffer is not None:
                    module._buffers[name] = buffer.to(_host(self.device) if module is embedding else self.device)
        if self.device.type == "cuda":
            embedding.register_forward_pre_hook(lambda module, args: (args[0].cpu(), *args[1:]))
            embedding.register_forward_hook(lambda module, args, rows: self._sent(rows))
            head.register_forward_pre_hook(self._bring_head)
            head.register_forward_hook(partial(self._take_head, head.weight), always_call=True)

    def _sent(self, rows: Tensor) -> Tensor:
        """A fresh piece of page-locked memory each time: it is given out again only once the copy out of it is done."""
        staging = host_buffer(rows.nbytes, pinned=True).view(rows.dtype).view(rows.shape)
        return staging.copy_(rows).to(self.device, non_blocking=True)

    def _bring_head(self, module: nn.Module, args: tuple) -> None:
        """Only where somebody calls the model for its logits: the sweep reads tiles."""
        module._parameters["weight"] = module.weight.to(self.device)

    def _take_head(self, weight: nn.Parameter, module: nn.Module, args: tuple, output: Any) -> None:
        module._parameters["weight"] = weight


def _host(device: torch.device) -> torch.device:
    return device if device.type == "meta" else torch.device("cpu")


def _piece(size: int, device: torch.device) -> Tensor:
    if device.type == "meta":
        return torch.empty(size, dtype=torch.uint8, device=device)
    return host_buffer(size, pinned=device.type == "cuda")


def _layers_of(model: nn.Module) -> list[nn.Module]:
    """The outermost decoder layers, in the order in which they run."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(map(id, module.modules()))
    if not found:
        raise UserError(
            f"reference_offload is set, but {type(model).__name__} has no decoder layers that are known as such; leave "
            "reference_offload off."
        )
    return found


def _shared(modules: list[nn.Module]) -> set[int]:
    """Weights that several layers have in common: they stay on the device."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in modules:
        own = {id(p) for p in module.parameters()}
        shared |= own & seen
        seen |= own
    return shared
