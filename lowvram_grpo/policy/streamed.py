"""A frozen model whose weights wait in host memory and visit the device layer by layer.

A pass holds two decoder layers on the device (`window.Window`): while one computes, the next arrives. A layer's weights
lie packed in host memory, page-locked where there is CUDA, so a visit is one copy that nobody waits for; between passes
nothing of a layer is on the device. Of the two tables, lm_head is read tile by tile by the sweep (`kernels.head.Head`),
and the input embedding gives the rows of its tokens, for which the host must see the ids: one wait a pass. What is left
(norms outside of the layers) stays on the device. The slots are freed once the compute stream has waited for every
copy: the allocator never sees memory that the other stream still touches.

The same code runs on a CPU (copies to other memory, the same bits) and on meta, where a ledger sees the two slots and
nothing of what lies in host memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_grpo.memory.host import host_buffer
from lowvram_grpo.policy.packed import (
    PackedLayer,
    check_room,
    host_of,
    known_layers,
    place,
    settle_all,
    used_elsewhere,
)
from lowvram_grpo.policy.window import Window

_CATEGORY = "reference"
_ROOM = "reference_offload", "the reference", "train a LoRA adapter, whose reference shares the policy's weights"


def copy_on_host(model: nn.Module) -> nn.Module:
    """A copy of `model` with its parameters in host memory, of which the device never holds a second one.

    Raises:
        UserError: the host has not that much memory.
    """
    check_room(model.parameters(), *_ROOM)
    memo: dict[int, Any] = {id(p): nn.Parameter(_at_home(p), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _at_home(tensor: Tensor) -> Tensor:
    """A copy in host memory, which on meta is meta that no ledger counts."""
    with _disable_current_modes():
        home = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta" if tensor.is_meta else "cpu")
        return home.copy_(tensor.detach())


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
        self.device = device
        self._window: Window | None = None
        modules = known_layers(model, "reference_offload")
        model.requires_grad_(False)
        self._shared = used_elsewhere(model, modules)
        self._layers = [PackedLayer(module, self._shared) for module in modules]
        check_room(model.parameters(), *_ROOM)
        self.locked = settle_all(self._layers, device, _CATEGORY)
        self._place_the_rest(model, modules)
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
        self._window = Window(self._layers, self.device, _CATEGORY)
        try:
            yield
        finally:
            self._window.close()
            self._window = None

    def _enter(self, i: int, module: nn.Module, args: tuple) -> None:
        layer = self._layers[i]
        if self._window is not None:
            place(layer.visiting(self._window.enter(i)))
        else:  # somebody calls the model by itself
            place(layer.visiting(layer.home.to(self.device)))

    def _exit(self, i: int, module: nn.Module, args: tuple, output: Any) -> None:
        self._layers[i].leave()
        if self._window is not None:
            self._window.leave(i)

    def _place_the_rest(self, model: nn.Module, modules: list[nn.Module]) -> None:
        inside = {id(p) for module in modules for p in module.parameters()} - self._shared
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
                    module._buffers[name] = buffer.to(host_of(self.device) if module is embedding else self.device)
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
