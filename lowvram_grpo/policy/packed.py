"""A decoder layer's frozen weights in one piece of host memory, and where in its modules they belong.

A weight is more than a parameter: bitsandbytes keeps the scales of a 4-bit weight, and those of the scales, in a state
beside it, and LLM.int8 its scales at the parameter and in the layer. All of them are packed, one behind another, so
that a layer's way to a device is one copy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import psutil  # comes with accelerate
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.modeling_layers import GradientCheckpointingLayer

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.host import host_buffer, placed, spans
from lowvram_grpo.memory.ledger import held_on_host
from lowvram_grpo.policy.embeddings import QuantizedTable
from lowvram_grpo.policy.quantized_experts import Resident

#: Page-locked memory comes in powers of two; as many neighbouring layers share a piece as leave least of it unused.
_TOGETHER = 8
_ALIGN = 256  # bytes: kernels read several numbers at once
_GIB = 2**30
# What bitsandbytes' state of a 4-bit weight consists of, beside the table of its codes, which all weights share and
# which stays on the device; `state2` is another such state.
_STATE = ("absmax", "offset")
# Copies of LLM.int8's weight and scales that a layer keeps from its first product on.
_INT8_STATE = ("CB", "SCB")
# With what bitsandbytes' parameters are made beside their numbers.
_ARGUMENTS = (
    "quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "module", "bnb_quantized",
    "has_fp16_weights", "CB", "SCB",
)  # fmt: skip


class _Place(NamedTuple):
    """Where a tensor belongs: an item of a dict or an attribute of anything else; which of a layer's tensors it is; and
    the parameter that it is the numbers of, if it is one's."""

    holder: Any
    name: str
    index: int
    parameter: nn.Parameter | None = None


class _Sized(Protocol):
    @property
    def bytes(self) -> int: ...


Packed = TypeVar("Packed", bound=_Sized)
Placing = list[tuple[Any, str, Any]]


class PackedLayer:
    """A decoder layer whose frozen weights lie in one piece of host memory.

    Args:
        skip: ids of parameters that stay where they are.

    Attributes:
        tensors: that the layer's weights consist of; at home once it has settled.
        bytes: of all of them, aligned.
    """

    def __init__(self, module: nn.Module, skip: Collection[int] = ()):
        self.module = module
        self.tensors: list[Tensor] = []
        self._places: list[_Place] = []
        known: dict[Any, int] = {}
        for part in module.modules():
            if hasattr(part, "init_8bit_state") and part.weight.CB is not None:
                part.init_8bit_state()  # or LLM.int8's first product would move what is noted here
            for holder, name, tensor, parameter in _held_by(part, skip):
                key = _identity(tensor)
                if key not in known:
                    known[key] = len(self.tensors)
                    self.tensors.append(tensor.detach())
                self._places.append(_Place(holder, name, known[key], parameter))
        self.starts, self.bytes = spans(self.tensors, _ALIGN)
        self.home = torch.empty(0, dtype=torch.uint8)
        self._at_home: Placing = []

    def settle(self, home: Tensor) -> None:
        """Move in: `home` is uint8 host memory of `bytes`."""
        with _disable_current_modes(), torch.no_grad():
            self.tensors = [placed(t, home, start).copy_(t) for t, start in zip(self.tensors, self.starts)]
        self.home = home
        self._at_home = self.placing(self.tensors)
        place(self._at_home)

    def visiting(self, flat: Tensor) -> Placing:
        """What `place` puts into the layer's modules so that they compute with the weights in `flat` (uint8)."""
        return self.placing([placed(t, flat, start) for t, start in zip(self.tensors, self.starts)])

    def leave(self) -> None:
        """Back to what is at home."""
        place(self._at_home)

    def placing(self, tensors: Sequence[Tensor]) -> Placing:
        """What `place` puts into the layer's modules so that `tensors` stand for its own."""
        parameters: dict[int, nn.Parameter] = {}
        placing: Placing = []
        for holder, name, index, parameter in self._places:
            value: Any = tensors[index]
            if parameter is not None:
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = _like(parameter, value)
                value = parameters[id(parameter)]
            elif isinstance(holder, nn.Parameter):  # that stands in another's place now
                holder = parameters[id(holder)]
            placing.append((holder, name, value))
        return placing


def place(placing: Placing) -> None:
    for holder, name, value in placing:
        if isinstance(holder, dict):
            holder[name] = value
        else:
            setattr(holder, name, value)


def _held_by(module: nn.Module, skip: Collection[int]) -> Iterator[tuple[Any, str, Tensor, nn.Parameter | None]]:
    """(holder, name, tensor, parameter) of what a module itself computes with and nobody trains. A parameter comes
    before what hangs on it."""
    for name, p in module._parameters.items():
        if p is None or p.requires_grad or id(p) in skip:
            continue
        yield module._parameters, name, p.detach(), p
        for state in _states(p):
            for part in _STATE:
                if isinstance(tensor := getattr(state, part, None), Tensor):
                    yield state, part, tensor, None
        for holder in (p, getattr(module, "state", None)):
            for part in _INT8_STATE:
                if isinstance(tensor := getattr(holder, "__dict__", {}).get(part), Tensor):
                    yield holder, part, tensor, None
    if isinstance(module, (QuantizedTable, Resident)):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module._buffers, name, buffer, None


def _states(parameter: nn.Parameter) -> Iterator[Any]:
    """bitsandbytes' state of a 4-bit weight, and that of its scales."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield state
        state = getattr(state, "state2", None)


def _identity(tensor: Tensor) -> tuple:
    """The same for tensors that are the same numbers, as LLM.int8's weight and its `CB` are."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape


def _like(parameter: nn.Parameter, tensor: Tensor) -> nn.Parameter:
    """A frozen parameter of that kind, with these numbers; of bitsandbytes' kinds, with what hangs on it."""
    kept = {name: value for name, value in vars(parameter).items() if name in _ARGUMENTS}
    return (type(parameter) if kept else nn.Parameter)(tensor, requires_grad=False, **kept)


def settle_all(layers: Sequence[PackedLayer], device: torch.device, category: str) -> bool:
    """Move layers to host memory, page-locked where `device` is CUDA, of that category of a ledger's. Whether all of it
    could be locked (on a CPU, True)."""
    locked = True
    for group in together(layers):
        *starts, size = accumulate((layer.bytes for layer in group), initial=0)
        with _disable_current_modes():
            piece = _piece(size, device)
        here = device.type != "cuda" or piece.is_pinned()
        held_on_host(category, size, locked=here)
        locked &= here
        for layer, start in zip(group, starts):
            layer.settle(piece[start : start + layer.bytes])
    return locked


def together(layers: Sequence[Packed]) -> Iterator[Sequence[Packed]]:
    """Neighbouring layers whose weights share a piece of host memory."""
    size = max(1, round(sum(layer.bytes for layer in layers) / len(layers)))
    waste = lambda n: (1 << (n * size - 1).bit_length()) / (n * size)
    count = min(range(1, min(_TOGETHER, len(layers)) + 1), key=waste)
    edges = [*range(0, len(layers), count), len(layers)]
    yield from (layers[a:b] for a, b in pairwise(edges))


def _piece(size: int, device: torch.device) -> Tensor:
    if device.type == "meta":
        return torch.empty(size, dtype=torch.uint8, device=device)
    return host_buffer(size, pinned=device.type == "cuda")


def host_of(device: torch.device) -> torch.device:
    return device if device.type == "meta" else torch.device("cpu")


def check_room(tensors: Iterable[Tensor], setting: str, what: str, remedy: str) -> None:
    """Before a system begins to swap. What lies in host memory already needs no more room.

    Raises:
        UserError: the host has not that much memory.
    """
    need = sum(t.nbytes for t in tensors if t.device.type not in ("cpu", "meta"))
    free = psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"{setting} keeps {need / _GIB:.1f} GiB of {what} in host memory, of which {free / _GIB:.1f} GiB are free; "
            f"close other programs, or {remedy}."
        )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost decoder layers, in the order in which they run."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(map(id, module.modules()))
    return found


def known_layers(model: nn.Module, setting: str) -> list[nn.Module]:
    """`decoder_layers`.

    Raises:
        UserError: there are none.
    """
    found = decoder_layers(model)
    if not found:
        raise UserError(
            f"{setting} is set, but {type(model).__name__} has no decoder layers that are known as such; leave "
            f"{setting} off."
        )
    return found


def used_elsewhere(model: nn.Module, layers: Sequence[nn.Module]) -> set[int]:
    """Ids of parameters that several of these layers have in common, or that other modules have too: they stay on the
    device."""
    inside: set[int] = set()
    seen: set[int] = set()
    shared: set[int] = set()
    for layer in layers:
        own = {id(p) for p in layer.parameters()}
        inside.update(map(id, layer.modules()))
        shared |= own & seen
        seen |= own
    outside = {id(p) for m in model.modules() if id(m) not in inside for p in m._parameters.values() if p is not None}
    return shared | (seen & outside)


def send_home(module: nn.Module) -> None:
    """Move what a module itself computes with to host memory, which on meta is meta that no ledger counts."""
    for holder, name, tensor, parameter in list(_held_by(module, ())):
        with _disable_current_modes(), torch.no_grad():
            home = torch.empty(tensor.shape, dtype=tensor.dtype, device=host_of(tensor.device)).copy_(tensor)
        place([(holder, name, home if parameter is None else _like(parameter, home))])


def bring_the_rest(model: nn.Module, device: torch.device) -> None:
    """Move whatever of `model` is not on `device` there, tensor by tensor, as `Module.to` would, which transformers
    refuses for models in 8 bits."""
    if device.type == "meta":
        return
    codes: dict[int, tuple[Tensor, Tensor]] = {}  # those from elsewhere too, which must not go while their ids count
    for module in model.modules():
        weight = module._parameters.get("weight")
        for state in () if weight is None else _states(weight):
            if (code := state.code).device != device:
                if id(code) not in codes:
                    codes[id(code)] = code, code.to(device)
                state.code = codes[id(code)][1]
        if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
            layer = PackedLayer(module)
            place(layer.placing([t.to(device) for t in layer.tensors]))
    model._apply(lambda t: t if t.device == device else t.to(device))
