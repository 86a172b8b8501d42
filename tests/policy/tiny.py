"""Random models of the architectures people train, too small to say anything."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE}),
    "gemma2": (Gemma2Config, {"sliding_window": 4}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False}),
    "phi3": (Phi3Config, {"tie_word_embeddings": False}),
}


def tiny_model(architecture: str, seed: int = 0, **overrides):
    kind, settings = CONFIGS[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **settings, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases start as ones and zeros, which a mix-up would not show in.
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape) * 0.1
    return model.eval()
