"""Tiny random models of today's families, for what their attention does beyond Llama's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn

_SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2, "initializer_range": 0.4,
}  # fmt: skip
_MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA4 = {
    "sliding_window": 6, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
    "global_head_dim": 16, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 97,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 12, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 2.0, 3.0],
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# What is peculiar to it: its class and settings. Windows, and positions where a scale or a frequency begins to change,
# lie within the sequences of the tests.
FAMILIES = {
    "gpt-oss: sinks": (
        "GptOss",
        {**_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_theta": 10000.0}},
    ),
    "gemma4: per-layer inputs, two head sizes": ("Gemma4", _GEMMA4),
    "gemma4: shared keys": ("Gemma4", {**_GEMMA4, "num_kv_shared_layers": 2}),
    "gemma4: values of keys": (
        "Gemma4",
        {**_GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4: experts": (
        "Gemma4",
        {
            **_GEMMA4, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 16,
        },
    ),
    "gemma2: soft-capping": ("Gemma2", {"sliding_window": 6, "attn_logit_softcapping": 2.0}),
    "olmo3": ("Olmo3", _MIXED),
    "smollm3: layers without positions": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "ministral3: queries scaled by position": ("Ministral3", {"rope_parameters": _YARN}),
    "phi4-mini: partial rotary": ("Phi3", {"partial_rotary_factor": 0.75, "sliding_window": None}),
    "qwen3-moe": ("Qwen3Moe", _EXPERTS),
}  # fmt: skip


def tiny_family(family: str, **overrides) -> nn.Module:
    """In eval mode, float32."""
    kind, settings = FAMILIES[family]
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma4" else f"{kind}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**{**_SMALL, **settings, **overrides})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("sinks"):
                p += 1.0  # else they take little of a softmax
    return model


@contextmanager
def as_transformers_has_it(model: nn.Module) -> Iterator[None]:
    """With the attention that knows of everything: before 5.24 Gemma 2 gets sdpa, which leaves its caps out."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def with_adapter(model: nn.Module) -> nn.Module:
    """LoRA on every linear layer that says something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model.eval()
