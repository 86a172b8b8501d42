"""Tiny random mixtures of experts, as transformers saves them, and the same with the numbers that 4 bits leave."""

from __future__ import annotations

import torch
from tiny import SIZES
from transformers import (
    AutoModelForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Lfm2MoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm
from lowvram_grpo.policy.quantized_experts import names, quantized_experts

CHOICE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {**CHOICE, "shared_expert_intermediate_size": 24}
FULL = ["full_attention"] * 2
RECURRENT = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MIXTURES = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen2_moe": (Qwen2MoeConfig, SHARED),
    "qwen3_moe": (Qwen3MoeConfig, CHOICE),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": FULL}),
    "granitemoe": (GraniteMoeConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "lfm2_moe": (Lfm2MoeConfig, {**CHOICE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "qwen3_next": (Qwen3NextConfig, {**SHARED, **RECURRENT}),
    "qwen3_5_moe": (Qwen3_5MoeTextConfig, {**SHARED, **RECURRENT}),
    "gemma4": (Gemma4TextConfig, {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                                  "moe_intermediate_size": 24, "vocab_size_per_layer_input": 96,
                                  "hidden_size_per_layer_input": 16, "layer_types": FULL}),
}  # fmt: skip
CPU = torch.device("cpu")


def mixture(family, seed=0, **overrides):
    kind, settings = MIXTURES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **settings, **overrides}))
    for name, parameter in model.named_parameters():
        if "bias" in name:  # they start as zeros, which a mix-up would not show in
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def loaded(folder, quantization="nf4", **given):
    return load_causal_lm(
        str(folder), device=CPU, dtype=torch.float32,
        quantization_config=bitsandbytes_config(quantization, torch.float32), **given,
    )  # fmt: skip


def eager_twin(folder, quantized):
    """The model in `folder`, all weights dense, with the numbers that `quantized` has, and eager experts."""
    from bitsandbytes.functional import dequantize_4bit

    twin = loaded(folder, "none")
    twin.config._experts_implementation = "eager"
    with torch.no_grad():
        for name, module in quantized.named_modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                twin.get_submodule(name).weight.copy_(dequantize_4bit(module.weight, state))
        for name, module in quantized_experts(quantized):
            workspace = torch.empty(module.expert_layout.weights)
            for expert in range(module.num_experts):
                weights = module.expert_layout.dense(module.home.record(expert), workspace)
                for leaf, weight in zip(names(module), weights):
                    getattr(twin.get_submodule(name), leaf)[expert].copy_(weight)
    return twin
