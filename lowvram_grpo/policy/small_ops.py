"""Norms, gated activations and rotary positions in fewer launches: `kernels/layer/ops.py` while sampling, and
`kernels/layer/gradients.py` in training.

For the length of a block (sampling), or of the model's life (training), modules get another `forward` (`norms.py`,
`gated_mlps.py`), and transformers' functions for rotary positions another value in the module whose attention looks
them up (`rotary.py`). What is replaced is known by what it computes, not by a list of architectures: the original and
the definition must agree bit for bit on a few random numbers. Anything that does not is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.delta_rule import replace_recurrences
from lowvram_grpo.policy.gated_mlps import give_mlps, replace_mlps
from lowvram_grpo.policy.norms import give_norms, replace_norms
from lowvram_grpo.policy.rotary import give_ropes, replace_ropes
from lowvram_grpo.policy.trials import MODES, model_dtypes, passes_trial, wanted

KINDS = ("rms_norm", "swiglu", "rope")
# A kind's two ways in: for a block, to be undone at its end; and for the model's life, with a gradient.
_REPLACE = {"rms_norm": replace_norms, "swiglu": replace_mlps, "rope": replace_ropes}
_GIVE = {"rms_norm": give_norms, "swiglu": give_mlps, "rope": give_ropes}


@contextmanager
def fast_modules(model: nn.Module, enabled: str = "auto") -> Iterator[dict[str, int]]:
    """Inside the block the model does the same in fewer launches; yields how many modules (functions for `rope`) of
    each of KINDS were replaced. Afterwards everything is as before.

    To be entered with the model in eval mode. Weights are read at each call. Replaced modules take their own way when
    gradients are enabled. The functions for rotary positions belong to an architecture, not to a model: other models
    of it in this process are served by the kernel meanwhile, with the same results.

    Args:
        model: with or without a PeftModel around it; its quantized layers and adapters are called as ever.
        enabled: `on`; `off`; `auto`, which on CUDA takes the kinds in `trials.EXPECTED_FASTER` and elsewhere none.

    Raises:
        UserError: no such mode.
    """
    if enabled not in MODES:
        raise UserError(f"fused_ops is {enabled!r}; it must be one of {', '.join(MODES)}.")
    counts = dict.fromkeys(KINDS, 0)
    with ExitStack() as undo:
        with torch.no_grad():
            for kind in _kinds(model, enabled):
                counts[kind] = _REPLACE[kind](model, undo)
            replace_recurrences(model, enabled, undo)
        yield counts


def differentiable_modules(model: nn.Module, enabled: str, autocast: torch.dtype | None = None) -> dict[str, int]:
    """From now on norms, gated activations and rotary positions of the model are computed by kernels that have a
    gradient, in every pass; how many modules (functions for `rope`) of each of KINDS there are.

    A norm whose weight is trained takes its own way while a graph is made. Copies of the model have the same. The
    functions for rotary positions are put back when the model is gone.

    Args:
        enabled: as in `fast_modules`.
        autocast: the dtype that passes will be computed in, where it is not the weights' own.
    """
    counts = dict.fromkeys(KINDS, 0)
    with torch.no_grad():
        for kind in _kinds(model, enabled, autocast, suffix="_grad"):
            counts[kind] = _GIVE[kind](model)
    return counts


def _kinds(model: nn.Module, enabled: str, autocast: torch.dtype | None = None, suffix: str = "") -> list[str]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if enabled == "off" or (enabled == "auto" and device.type != "cuda"):
        return []
    dtypes = model_dtypes(model, device, autocast)
    asked = [kind for kind in KINDS if wanted(kind + suffix, enabled)]
    return [kind for kind in asked if all(passes_trial(kind + suffix, device, dtype) for dtype in dtypes)]
