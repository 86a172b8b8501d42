"""Dropout: the model's own is off in every pass whose log-probs are compared, an adapter's where it is asked for.

Policy, old, reference and sampled log-probs belong to one function only if nothing is dropped at random in any of them:
with GPT-2's own dropout of 0.1 the ratio of equal weights is 0.83 to 1.35. What a model drops it drops in train mode
(nn.Dropout, `F.dropout(training=self.training)`, layerdrop, a router's jitter), so while the policy is scored for its
gradient everything is in evaluation mode except what has to know that it is trained: layers that checkpoint their
activations, and the adapter's dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.modeling_layers import GradientCheckpointingLayer

from lowvram_grpo.policy.wrapper import unwrap

_ADAPTER_DROPOUT = "lora_dropout"


def disable_dropout(model: nn.Module) -> None:
    """Every dropout module to 0, the adapter's too."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0


def adapter_dropout(model: nn.Module) -> float:
    """The largest probability with which the adapter drops an input; 0 without an adapter."""
    return max((m.p for m in _adapter_dropouts(model)), default=0.0)


def training_mode(model: nn.Module) -> None:
    """Put `model` into train mode for a pass with a gradient, without its own dropout. `model.eval()` ends it, and
    `model.train()` would undo it: to be called before each such pass. The backward pass must find it still in force,
    since checkpointed layers are run again there."""
    for module in model.modules():
        module.training = _must_know(module)
    model.training = True
    for layer in model.modules():
        if dropouts := _dropouts_of(layer):
            layer.training = True  # DoRA looks at the layer's own, which is not the base layer's
            for dropout in dropouts:
                dropout.training = True


def _must_know(module: nn.Module) -> bool:
    if not vars(module).get("gradient_checkpointing"):
        return False
    # transformers' layers look at `training` themselves; a model from the hub's code asks for its layers.
    return isinstance(module, GradientCheckpointingLayer) or type(module).__module__.startswith("transformers_modules")


def _adapter_dropouts(model: nn.Module) -> list[_DropoutNd]:
    return [dropout for module in model.modules() for dropout in _dropouts_of(module)]


def _dropouts_of(layer: nn.Module) -> list[_DropoutNd]:
    """Of the adapters on this very layer."""
    holder = layer._modules.get(_ADAPTER_DROPOUT)
    return [d for d in holder.values() if isinstance(d, _DropoutNd)] if isinstance(holder, nn.ModuleDict) else []


def steady_layers(model: nn.Module) -> None:
    """Have layers that checkpoint their activations compute as in evaluation mode, the first time and in the backward
    pass: some drop activations by their own `training`, which has to be true for them to be checkpointed."""
    for layer in unwrap(model).modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer._gradient_checkpointing_func = partial(_checkpointed, layer, layer._gradient_checkpointing_func)


def _checkpointed(layer: nn.Module, checkpoint: Callable, run: Callable, *args: Any) -> Any:
    return checkpoint(partial(_run, layer, run), *args)


def _run(layer: nn.Module, run: Callable, *args: Any) -> Any:
    was_training, layer.training = layer.training, False
    try:
        return run(*args)
    finally:
        layer.training = was_training
