"""A policy larger than its card: decoder layers whose frozen weights wait in host memory (`weight_offload`).

The base weights of a streamed layer, whatever they are in (4-bit with its scales, LLM.int8, 16 or 32 bits), are packed
in host memory and come to the device one layer ahead of the computation, through two slots (`window.Window`): in every
forward pass, in the backward pass from the last layer to the first, while sampling and while training. What is trained,
the adapter, stays on the device, and so does whatever is outside of the streamed layers.

A layer's parameters ARE views of its slot, for the model's life. Their bytes come and go, their addresses do not: what
autograd, bitsandbytes' functions and our own, a rollout's fused layers and CUDA graphs keep of a weight is right
whenever the layer is in its slot, and that is what the hooks here see to:

* forward: the layer is in its slot from before its call to after it;
* backward: it is there again from the moment when the gradient of its output is known (a hook on the output) until that
  of its input is (`_InputsDone`, whose node no other of the layer's can follow). In between lie its recomputation,
  where activations are checkpointed, and all of its backward work.

A copy that fails raises, from the layer's call or the backward pass, and the slot counts as empty: the pass ends, and
the next one copies again. The same code runs on a CPU (copies to other memory, the same bits) and on meta, where a
ledger counts the two slots as "streamed weights" and what lies at home apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.packed import (
    PackedLayer,
    bring_the_rest,
    check_room,
    decoder_layers,
    known_layers,
    place,
    settle_all,
    used_elsewhere,
)
from lowvram_grpo.policy.window import Window
from lowvram_grpo.policy.wrapper import is_peft, unwrap
from lowvram_grpo.recipe.weight_offload import streamed_layers

_SETTING = "weight_offload"
_ATTRIBUTE = "_weight_stream"
_MERGED = (
    "The model's weights are streamed from host memory (weight_offload), so no adapter can be merged into them; save "
    "the adapter, and merge it into the model as loaded without weight_offload."
)


def streamed_indices(n_layers: int, n: int) -> list[int]:
    """Which of `n_layers` decoder layers wait in host memory where `n` shall: spread evenly, so that copies go on while
    layers compute that are on the device."""
    n = max(0, min(n, n_layers))
    return [(2 * i + 1) * n_layers // (2 * n) for i in range(n)]


def streamed_modules(model: nn.Module, n: int) -> list[nn.Module]:
    """The decoder layers of `model` that wait in host memory where `n` shall."""
    layers = decoder_layers(model)
    return [layers[i] for i in streamed_indices(len(layers), n)]


def layers_on_host(weight_offload: str | int, model: nn.Module) -> int:
    """How many decoder layers of `model` wait in host memory by that setting of GRPOConfig."""
    return streamed_layers(weight_offload, len(decoder_layers(model)))


def stream_of(model: nn.Module) -> WeightStream | None:
    """The stream of a model's weights, with or without a PeftModel around it; None where all are on the device."""
    return vars(unwrap(model)).get(_ATTRIBUTE)


def stream_weights(model: nn.Module, n: int, device: torch.device | str) -> WeightStream:
    """Stream the frozen weights of `n` decoder layers of `model` from host memory from now on, and bring everything
    else to `device`.

    Args:
        model: causal language model, with its adapter on it; its weights may be anywhere, those of streamed layers best
            in host memory (`stream.materialize`). On meta, `device` is meta.
        n: how many layers; all where it is as large as the model.

    Raises:
        UserError: the base is trained, its layers are not known as such, it is streamed already, or the host has not
            that much memory.
    """
    if stream_of(model) is not None:
        raise UserError("The model's weights are streamed already; load it anew to stream another number of layers.")
    # Of a card whose number was left out, the one that tensors say they are on.
    return WeightStream(model, n, torch.empty(0, device=device).device)


class WeightStream:
    """Streamed layers of one model. See `stream_weights`.

    Attributes:
        layers: which of the model's decoder layers are streamed.
        locked: whether all of them lie in page-locked memory; from other memory copies wait (on a CPU, always True).
    """

    def __init__(self, model: nn.Module, n: int, device: torch.device):
        modules = known_layers(model, _SETTING)
        self.layers = streamed_indices(len(modules), n)
        if not self.layers:
            raise UserError(f"weight_offload is {n}; it must be at least 1 layer, or off.")
        chosen = [modules[i] for i in self.layers]
        self.device = device
        resident = used_elsewhere(model, chosen) | _of_adapters(model)
        self._packed = [PackedLayer(module, resident) for module in chosen]
        if not all(layer.tensors for layer in self._packed):
            raise UserError(
                "weight_offload streams frozen weights, and those of this model are trained; pass a peft_config, or "
                "leave weight_offload off."
            )
        tensors = [t for layer in self._packed for t in layer.tensors]
        check_room(tensors, _SETTING, "the model", "take a smaller model")
        self.locked = settle_all(self._packed, device, "weights")
        self._window = Window(self._packed, device, "streamed weights")
        self._visits = [layer.visiting(self._window.slots[i % 2]) for i, layer in enumerate(self._packed)]
        for visit in self._visits:
            place(visit)
        bring_the_rest(model, device)
        for i, module in enumerate(chosen):
            module.register_forward_pre_hook(partial(self._enter, i), with_kwargs=True)
            module.register_forward_hook(partial(self._leave, i), always_call=True)
            module.register_state_dict_pre_hook(partial(self._home, i))
            module.register_state_dict_post_hook(partial(self._back, i))
            for part in module.modules():
                if is_tuner_layer(part):
                    part.merge = _refuse_to_merge
        setattr(unwrap(model), _ATTRIBUTE, self)

    @property
    def bytes(self) -> int:
        """Of the streamed layers' weights, which every pass moves to the device."""
        return sum(layer.bytes for layer in self._packed)

    @property
    def parts(self) -> list[list[int]]:
        """Of each streamed layer, the bytes of its tensors, as each would take them on the device by itself."""
        return [[t.nbytes for t in layer.tensors] for layer in self._packed]

    @property
    def sizes(self) -> list[int]:
        """Of each streamed layer, its bytes in host memory and in a slot."""
        return [layer.bytes for layer in self._packed]

    def settle(self) -> None:
        """Have the first two layers in their slots, the compute stream behind them and no copy under way: how a CUDA
        graph that holds whole passes begins, and how it must end."""
        self._window.settle()

    def forget(self) -> None:
        """What the slots hold is not known any more: a capture, which only notes copies, was broken off."""
        self._window.forget()

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Inside the block the streamed layers' parameters are those in host memory, to be read and changed. The model
        does not compute meanwhile."""
        self._window.close()
        for layer in self._packed:
            layer.leave()
        try:
            yield
        finally:
            for visit in self._visits:
                place(visit)
            self._window.forget()

    # Hooks of a layer

    def _enter(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        self._window.enter(i, back=_in_backward())
        if not torch.is_grad_enabled():
            return None
        inputs = [*args, *kwargs.values()]
        marked = [j for j, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
        if not marked:
            return None
        for j, x in zip(marked, _InputsDone.apply(self._window, i, *(inputs[j] for j in marked))):
            inputs[j] = x
        return tuple(inputs[: len(args)]), dict(zip(kwargs, inputs[len(args) :]))

    def _leave(self, i: int, module: nn.Module, args: tuple, output: Any) -> None:
        graph = torch.is_grad_enabled()
        if graph:
            for x in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(partial(self._output_known, i))
        if not _in_backward():  # where it is recomputed for what now follows
            self._window.leave(i, again=not graph)

    def _output_known(self, i: int, grad: Tensor) -> None:
        self._window.enter(i, back=True)

    # What is saved is what is at home.

    def _home(self, i: int, *_: Any) -> None:
        self._packed[i].leave()

    def _back(self, i: int, *_: Any) -> None:
        place(self._visits[i])


class _InputsDone(torch.autograd.Function):
    """The inputs of layer `i` as they are; their gradients are known when the layer's backward work has been queued."""

    @staticmethod
    def forward(ctx: Any, window: Window, i: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.window, ctx.i = window, i
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        ctx.window.leave(ctx.i, back=True)
        return None, None, *grads


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether it is one of peft's layers."""
    return hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer")


def _of_adapters(model: nn.Module) -> set[int]:
    """Ids of all adapters' parameters, those that nobody trains too."""
    if not is_peft(model):
        return set()
    found: set[int] = set()
    for layer in filter(is_tuner_layer, model.modules()):
        for name in layer.adapter_layer_names:
            part = getattr(layer, name, None)
            if isinstance(part, (nn.Module, nn.ParameterDict)):
                found.update(map(id, part.parameters()))
    return found


def _refuse_to_merge(*_: Any, **__: Any) -> None:
    raise UserError(_MERGED)
