"""Adapters beside experts: on attention and shared experts, not on experts unless somebody names their parameters.

For families whose experts were linear layers in transformers 4, peft takes `gate_proj`, `up_proj` and `down_proj` among
the targets (and `all-linear`) to mean the experts' 3-D parameters and the router, shared experts and dense layers of
the same name left out. Experts in 4 bits have no such parameters, and for `all-linear` an adapter on each of hundreds
of experts is not what is meant (`lora_targets`); `target_parameters` names them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from lowvram_grpo.errors import UserError, some
from lowvram_grpo.policy.lora_targets import ALL_LINEAR, linear_layers
from lowvram_grpo.policy.quantized_experts import holds_experts, quantized_experts

if TYPE_CHECKING:
    from peft import PeftConfig


def without_experts(model: nn.Module, config: PeftConfig) -> bool:
    """Whether names in `config` mean linear layers alone, and `all-linear` becomes names in it; it is about to be put
    onto `model`.

    Raises:
        UserError: it names parameters of experts that are in 4 bits.
    """
    in_4_bits = any(quantized_experts(model))
    if not in_4_bits and not any(map(holds_experts, model.modules())):
        return False
    if in_4_bits and getattr(config, "target_parameters", None):
        raise UserError(
            f"target_parameters names {some(sorted(config.target_parameters))}, and experts in 4 bits have no "
            "parameters to adapt; load the model with quantization none, or leave target_parameters unset."
        )
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        config.target_modules = {name for name, why in linear_layers(model).items() if why is None}
        return True
    named = () if not in_4_bits or isinstance(wanted, str) else wanted or ()
    if lacking := sorted(name for name in named if not _names(name, linear_layers(model))):
        warnings.warn(
            f"target_modules names {some(lacking)}, which are experts here: they are in 4 bits and get no adapter.",
            stacklevel=2,
        )
    return in_4_bits


def was_without_experts(model: nn.Module, config: PeftConfig) -> bool:
    """Whether names in the configuration of a saved adapter mean linear layers alone: each of them is one, and no
    parameters are named, as they would be had peft changed it."""
    wanted = config.target_modules
    if any(quantized_experts(model)):
        return True
    if getattr(config, "target_parameters", None) or not wanted or isinstance(wanted, str):
        return False
    return all(_names(name, linear_layers(model)) for name in wanted)


def _names(target: str, layers: dict[str, str | None]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in layers)


@contextmanager
def names_as_they_are(wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, peft takes names in target_modules to mean modules of that name."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a version that has no such rules
        conversion = None
    rule = getattr(conversion, "_convert_peft_config_moe", None)
    if not wanted or rule is None:
        yield
        return
    conversion._convert_peft_config_moe = lambda config, model: None
    try:
        yield
    finally:
        conversion._convert_peft_config_moe = rule
