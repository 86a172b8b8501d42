"""Gated MLPs whose activation and product are one launch: those of a model that `swiglu` computes to the bit, while
sampling and in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from lowvram_grpo.kernels.layer import gradients as layer_gradients
from lowvram_grpo.kernels.layer.ops import ACTIVATIONS, swiglu, swiglu_ref
from lowvram_grpo.policy.own_forward import (
    give_forward,
    has_foreign_forward,
    is_watched,
    replace_forward,
    same_bits,
    stands_in,
)
from lowvram_grpo.policy.trials import random_numbers

# Layers of a gated MLP, and what it calls its activation: all there is in it.
_MLPS = (({"gate_proj", "up_proj", "down_proj"}, "act_fn"), ({"gate_up_proj", "down_proj"}, "activation_fn"))


class _SmallLinear(nn.Module):
    """A linear layer small enough to ask questions of."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _mlps(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Those that `swiglu` knows, with their activation, and where what they do with a tile of tokens is to be put."""
    for mlp in model.modules():
        # An MLP in tiles keeps them, see policy.checkpointing.tile_mlps: only what it does with a tile is replaced.
        name = "_untiled_forward" if hasattr(mlp, "_tile_tokens") else "forward"
        if not has_foreign_forward(mlp, name) and (act := _activation(mlp)):
            yield mlp, act, name


def replace_mlps(model: nn.Module, undo: ExitStack) -> int:
    """Have the model's gated MLPs sample by the kernel until `undo` is unwound; how many there are."""
    found = list(_mlps(model))
    for mlp, act, name in found:
        replace_forward(mlp, name, _mlp_forward(mlp, act), undo)
    return len(found)


def give_mlps(model: nn.Module) -> int:
    """Have the model's gated MLPs train by the kernel from now on; how many there are."""
    found = list(_mlps(model))
    for mlp, act, name in found:
        mlp._gate_activation = act
        mlp._gate_name = next(name for layers, name in _MLPS if layers <= {*dict(mlp.named_children())})
        give_forward(mlp, _differentiable_mlp, name)
    return len(found)


@stands_in
def _differentiable_mlp(self: nn.Module, *args, **kwargs) -> Tensor:
    activation = self._modules.get(self._gate_name)  # which is not called here
    if len(args) != 1 or kwargs or (activation is not None and is_watched(activation)):
        return type(self).forward(self, *args, **kwargs)
    return self.down_proj(_gated(self, args[0], self._gate_activation, layer_gradients.swiglu))


def _activation(mlp: nn.Module) -> str | None:
    """None where this is no MLP of a kind that `swiglu` knows."""
    children = dict(mlp.named_children())
    for layers, act_name in _MLPS:
        if set(children) - {act_name} != layers or list(mlp.parameters(recurse=False)):
            continue
        for act in ACTIVATIONS:
            small, x = _in_small(mlp, layers), random_numbers(2, 3, 8)
            ours = lambda small=small, x=x, act=act: small.down_proj(_gated(small, x, act, swiglu_ref))
            if same_bits(partial(type(mlp).forward, small, x), ours):
                return act
    return None


def _in_small(mlp: nn.Module, layers: set[str]) -> nn.Module:
    """An MLP of the same class and settings with tiny layers on the CPU, wherever and whatever the real ones are."""
    small = type(mlp).__new__(type(mlp))
    nn.Module.__init__(small)
    own = set(vars(small))
    small.__dict__.update({k: v for k, v in vars(mlp).items() if k not in own})
    for name, child in mlp.named_children():
        if name not in layers:
            setattr(small, name, child)  # the activation
    shapes = {"gate_proj": (8, 12), "up_proj": (8, 12), "gate_up_proj": (8, 24), "down_proj": (12, 8)}
    for i, name in enumerate(sorted(layers)):
        setattr(small, name, _SmallLinear(random_numbers(*shapes[name], seed=3 + i)))
    return small.eval()


def _gated(mlp: nn.Module, x: Tensor, act: str, gated: Callable) -> Tensor:
    """What goes into down_proj."""
    if hasattr(mlp, "gate_up_proj"):
        return gated(*mlp.gate_up_proj(x).chunk(2, -1), act)
    return gated(mlp.gate_proj(x), mlp.up_proj(x), act)


def _mlp_forward(mlp: nn.Module, act: str) -> Callable[..., Tensor]:
    original = type(mlp).forward

    def forward(*args, **kwargs) -> Tensor:
        if len(args) != 1 or kwargs or torch.is_grad_enabled():
            return original(mlp, *args, **kwargs)
        return mlp.down_proj(_gated(mlp, args[0], act, swiglu))

    return forward
