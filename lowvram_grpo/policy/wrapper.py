"""A model with or without a PeftModel around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face causal language model inside a PeftModel (its layers carry the adapter), or the model itself."""
    return model.get_base_model() if is_peft(model) else model
