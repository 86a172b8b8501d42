"""What a training pass computes in fewer launches than the model's and peft's own code, chosen for the device.

Small models are bound by launches: a micro-batch of a 0.5B with 24 layers took 11,000 of them. What is given here stays
for the model's life, changes neither parameters nor what is saved, and serves every pass: training, the reference,
evaluation.
"""

from __future__ import annotations

import torch
from torch import nn

from lowvram_grpo.policy.delta_rule import give_recurrences
from lowvram_grpo.policy.fused_lora import fuse_lora
from lowvram_grpo.policy.small_ops import differentiable_modules
from lowvram_grpo.policy.trials import usable


def fewer_launches(model: nn.Module, enabled: str, autocast: torch.dtype | None) -> None:
    """Give modules of `model` their own forwards, see `fuse_lora` and `give_recurrences` (on every device) and
    `differentiable_modules`.

    Args:
        enabled: `off`, or `fused_ops` as in `small_ops.fast_modules`.
        autocast: the dtype that passes will be computed in, where it is not the weights' own.
    """
    if enabled == "off":
        return
    differentiable_modules(model, enabled, autocast)
    give_recurrences(model, enabled, autocast)
    device = next(model.parameters()).device
    fuse_lora(model, nf4_kernel=device.type == "cuda" and usable("nf4_dense", device, enabled))
