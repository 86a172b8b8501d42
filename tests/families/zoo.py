"""A tiny random model of every family that docs/models.md speaks of: two layers of each kind at least, and each of the
family's peculiarities set to something that a mix-up would show in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn

# Widths that 4-bit blocks of 64 divide.
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
WINDOW = 6  # shorter than the prompts of the tests
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GATED_DELTA = {
    "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MROPE = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
}  # fmt: skip
WINDOWS = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW,
}  # fmt: skip
CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
MAMBA = {
    "num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4,
    "mamba_d_state": 16, "mamba_d_head": 32, "mamba_chunk_size": 16,
}  # fmt: skip
GRANITE = {
    "logits_scaling": 4.0, "embedding_multiplier": 4.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5,
    "tie_word_embeddings": True,
}  # fmt: skip
GEMMA_4 = {"global_head_dim": 32, "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0}
YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 1e4}


@dataclass(frozen=True)
class Family:
    """A family of published models.

    Attributes:
        name: for people.
        members: names of the table of architectures, or else ids on the hub.
        config: name of the configuration's class in transformers.
        settings: what its tiny model has other than SIZES.
        whole: its checkpoints are multimodal, `{whole}ForConditionalGeneration` of transformers.
    """

    name: str
    members: tuple[str, ...]
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    whole: str | None = None

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "-")


FAMILIES = (
    Family("Qwen2.5", ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-14B"), "Qwen2Config",
           {"tie_word_embeddings": True}),
    Family("Qwen3", ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B"), "Qwen3Config",
           {"tie_word_embeddings": True}),
    Family("Qwen3.5", ("Qwen3.5-0.8B", "Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B"),
           "Qwen3_5TextConfig", {**GATED_DELTA, **MROPE, "tie_word_embeddings": True}, "Qwen3_5"),
    Family("Qwen3.5 MoE", ("Qwen3.5-35B-A3B",), "Qwen3_5MoeTextConfig",
           {**GATED_DELTA, **EXPERTS, **MROPE, "shared_expert_intermediate_size": 64}, "Qwen3_5Moe"),
    Family("Qwen3-Next", ("Qwen3-Next-80B-A3B",), "Qwen3NextConfig",
           {**GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 64}),
    Family("Qwen3 MoE", ("Qwen3-30B-A3B",), "Qwen3MoeConfig", EXPERTS),
    Family("Gemma 3", ("Gemma-3-1B", "Gemma-3-4B"), "Gemma3TextConfig",
           {**WINDOWS, "query_pre_attn_scalar": 8}, "Gemma3"),
    Family("Gemma 4 E", ("Gemma-4-E2B", "Gemma-4-E4B"), "Gemma4TextConfig",
           {**WINDOWS, **GEMMA_4, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96,
            "use_double_wide_mlp": True}, "Gemma4"),
    Family("Gemma 4 dense", ("Gemma-4-31B",), "Gemma4TextConfig",
           {**WINDOWS, **GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}, "Gemma4"),
    Family("Gemma 4 unified", ("google/gemma-4-12B-it",), "Gemma4UnifiedTextConfig",
           {**WINDOWS, **GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}, "Gemma4Unified"),
    Family("Gemma 4 MoE", ("Gemma-4-26B-A4B",), "Gemma4TextConfig",
           {**WINDOWS, **GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True,
            "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}, "Gemma4"),
    Family("LFM2", ("LFM2-350M", "LFM2-700M", "LFM2-1.2B", "LFM2-2.6B", "LFM2.5-350M", "LFM2.5-1.2B"), "Lfm2Config",
           {**CONVOLUTIONS, "block_auto_adjust_ff_dim": False}),
    Family("LFM2 MoE", ("LFM2-8B-A1B",), "Lfm2MoeConfig", {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 2}),
    Family("SmolLM3", ("SmolLM3-3B",), "SmolLM3Config",
           {"num_hidden_layers": 4, "no_rope_layers": [1, 0] * 2}),
    Family("gpt-oss", ("gpt-oss-20b",), "GptOssConfig",
           {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "factor": 4.0, "truncate": False, "original_max_position_embeddings": 32}}),
    Family("OLMo 3", ("Olmo-3-7B", "Olmo-3-32B"), "Olmo3Config", WINDOWS),
    Family("Ministral 3", ("Ministral-3-3B", "Ministral-3-8B", "Ministral-3-14B"),
           "Ministral3Config",
           {"tie_word_embeddings": True,
            "rope_parameters": {**YARN, "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0,
                                "max_position_embeddings": 128, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
           "Mistral3"),
    Family("Phi-4-mini", ("Phi-4-mini",), "Phi3Config",
           {"tie_word_embeddings": True, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}}),
    Family("Granite 4 hybrid", ("Granite-4.0-H-350M", "Granite-4.0-H-1B", "Granite-4.0-H-Micro"),
           "GraniteMoeHybridConfig", {**MAMBA, **GRANITE, "num_local_experts": 0, "shared_intermediate_size": 128}),
    Family("Granite 4 hybrid MoE", ("Granite-4.0-H-Tiny", "Granite-4.0-H-Small"), "GraniteMoeHybridConfig",
           {**MAMBA, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
            "intermediate_size": 64}),
    Family("Granite 4", ("Granite-4.0-350M", "Granite-4.0-1B", "Granite-4.0-Micro"),
           "GraniteMoeHybridConfig",
           {**MAMBA, **GRANITE, "num_hidden_layers": 2, "layer_types": ["attention"] * 2, "num_local_experts": 0,
            "shared_intermediate_size": 128, "position_embedding_type": "rope"}),
    Family("Granite 3", ("ibm-granite/granite-3.3-2b-instruct", "ibm-granite/granite-3.3-8b-instruct"), "GraniteConfig",
           GRANITE),
    Family("Llama 3", ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B"), "LlamaConfig",
           {"tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    Family("Mistral", ("Mistral-7B-v0.3",), "MistralConfig", {"sliding_window": WINDOW}),
)  # fmt: skip
NAMED = {family.name: family for family in FAMILIES}


def config_of(family: Family, **overrides: Any) -> Any:
    """Skips a test where this transformers does not know the family yet."""
    kind = getattr(transformers, family.config, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family.config}")
    return kind(**{**SIZES, **family.settings, **overrides})


def randomized(model: nn.Module) -> nn.Module:
    """Norms, biases and gates begin as ones and zeros, which a mix-up would not show in."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1
    return model.eval()


def tiny(family: Family, seed: int = 0, **overrides: Any) -> nn.Module:
    """The family's language model, random."""
    torch.manual_seed(seed)
    return randomized(transformers.AutoModelForCausalLM.from_config(config_of(family, **overrides)))


def whole_config(family: Family, text: Any) -> Any:
    """The configuration of a multimodal model with the language model `text` in it, and a tower as small as one is."""
    of = getattr(transformers, f"{family.whole}Config")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if family.whole.startswith("Qwen"):
        tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
                 "num_position_embeddings": 16}  # fmt: skip
    elif family.whole == "Gemma4Unified":
        tower = {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64}
    elif family.whole == "Gemma3":
        tower = {**sizes, "image_size": 28, "patch_size": 14}
    else:
        tower = {**sizes, "head_dim": 16, "num_key_value_heads": 2, "image_size": 28, "patch_size": 14}
    extra = {"mm_tokens_per_image": 4} if family.whole == "Gemma3" else {}
    if family.whole.startswith("Gemma4"):
        extra["audio_config"] = None
    return of(text_config=text.to_dict(), vision_config=tower, tie_word_embeddings=text.tie_word_embeddings, **extra)


def tiny_whole(family: Family, seed: int = 0) -> nn.Module:
    """The family's multimodal model."""
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{family.whole}ForConditionalGeneration")
    return randomized(kind(whole_config(family, config_of(family))))
