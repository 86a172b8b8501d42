"""Which bitsandbytes configuration a quantization's name stands for, and which name a configuration goes by."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from lowvram_grpo.errors import UserError


def bitsandbytes_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """`none`, `int8` (LLM.int8) or `nf4` (4-bit NormalFloat with double quantization, QLoRA: arXiv:2305.14314)."""
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    raise UserError(f"quantization is {quantization!r}; it must be none, int8 or nf4.")


def quantization_name(config: Any) -> str:
    """`none`, `int8`, `nf4`, `fp4`, or the method of another package (gptq, awq, ...).

    Args:
        config: a quantization config, as an object or as the dict that a config.json has, or None.
    """
    if config is None:
        return "none"
    settings = config if isinstance(config, dict) else config.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit"):
        return settings.get("bnb_4bit_quant_type", "fp4")
    method = settings.get("quant_method", "an unknown format")
    return getattr(method, "value", method)


def streamed_quantization(config: Any, dtype: torch.dtype) -> str | None:
    """`none` or `nf4` if `policy.stream` makes exactly what `config` asks for, computing in `dtype`; else None."""
    if config is None:
        return "none"
    if not isinstance(config, BitsAndBytesConfig):
        return None
    return "nf4" if config.to_dict() == bitsandbytes_config("nf4", dtype).to_dict() else None


def check_stored(model: str, stored: Any, asked: Any) -> None:
    """Whether a checkpoint that is quantized already is what was asked for; asking for nothing is always right.

    Raises:
        UserError: it is not.
    """
    found, wanted = quantization_name(stored), quantization_name(asked)
    if wanted not in ("none", found):
        raise UserError(
            f"{model!r} is stored in {found} already and cannot be loaded in {wanted}; set quantization to none to "
            "take it as it is, or give the model that it was made from."
        )
