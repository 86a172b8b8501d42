"""RMSNorms in one launch: those of a model that `rms_norm` computes to the bit, while sampling and in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from lowvram_grpo.kernels.layer import gradients as layer_gradients
from lowvram_grpo.kernels.layer.ops import rms_norm, rms_norm_ref
from lowvram_grpo.policy.own_forward import give_forward, has_foreign_forward, replace_forward, same_bits, stands_in
from lowvram_grpo.policy.trials import random_numbers

# (offset, early) of `rms_norm`: Llama's, Gemma's, Olmo 2's.
_VARIANTS = ((0.0, True), (1.0, False), (0.0, False))


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[float, bool]]]:
    """Those that `rms_norm` knows, with (offset, early)."""
    known: dict[tuple, tuple[float, bool] | None] = {}
    for norm in model.modules():
        if not _is_norm(norm):
            continue
        plain = tuple(item for item in sorted(vars(norm).items()) if isinstance(item[1], (bool, int, float, str)))
        key = type(norm), norm.weight.dtype, plain
        if key not in known:
            known[key] = _variant(norm)
        if known[key] is not None:
            yield norm, known[key]


def replace_norms(model: nn.Module, undo: ExitStack) -> int:
    """Have the model's norms sample by the kernel until `undo` is unwound; how many there are."""
    found = list(_norms(model))
    for norm, variant in found:
        replace_forward(norm, "forward", _norm_forward(norm, *variant), undo)
    return len(found)


def give_norms(model: nn.Module) -> int:
    """Have the model's norms train by the kernel from now on; how many there are."""
    found = list(_norms(model))
    for norm, variant in found:
        norm._norm_variant = variant
        give_forward(norm, _differentiable_norm)
    return len(found)


@stands_in
def _differentiable_norm(self: nn.Module, *args, **kwargs) -> Tensor:
    if len(args) != 1 or kwargs or (self.weight.requires_grad and torch.is_grad_enabled()):
        return type(self).forward(self, *args, **kwargs)
    offset, early = self._norm_variant
    return layer_gradients.rms_norm(args[0], self.weight, _eps(self), offset=offset, early=early)


def _is_norm(module: nn.Module) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or has_foreign_forward(module):
        return False
    weight = dict(module.named_parameters()).get("weight")
    alone = len(list(module.parameters())) == 1 and not list(module.buffers())
    return alone and weight is not None and weight.ndim == 1 and isinstance(_eps(module), float)


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _variant(norm: nn.Module) -> tuple[float, bool] | None:
    """(offset, early), found with random weights: ones or zeros, as new models have, would not tell."""
    weight, eps = random_numbers(24).to(norm.weight.dtype), _eps(norm)
    # Rows so small that eps matters, too.
    sizes = 10.0 ** -random_numbers(8, 1, seed=2).abs()
    xs = [(random_numbers(8, 24, seed=1) * sizes).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    run = partial(torch.func.functional_call, norm, {"weight": weight})
    for offset, early in _VARIANTS:
        ours = partial(rms_norm_ref, weight=weight, eps=eps, offset=offset, early=early)
        if all(same_bits(partial(run, (x,)), partial(ours, x)) for x in xs):
            return offset, early
    return None


def _norm_forward(norm: nn.Module, offset: float, early: bool) -> Callable[..., Tensor]:
    eps, original = _eps(norm), type(norm).forward

    def forward(*args, **kwargs) -> Tensor:
        if len(args) != 1 or kwargs or torch.is_grad_enabled():
            return original(norm, *args, **kwargs)
        return rms_norm(args[0], norm.weight, eps, offset=offset, early=early)

    return forward
