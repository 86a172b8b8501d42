"""Tiny random hybrids: layers with a state beside attention."""

from __future__ import annotations

import torch
from torch import nn

_SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "mamba_expand": 2, "mamba_d_conv": 4,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_MIXED = ["linear_attention", "full_attention", "linear_attention"]

# The class's beginning, and what its configuration says beyond the sizes.
HYBRIDS = {
    "Qwen3_5": {**_DELTA, "layer_types": _MIXED},
    "Qwen3_5Moe": {**_DELTA, **_MOE, "layer_types": _MIXED},
    "Qwen3Next": {**_DELTA, **_MOE, "layer_types": _MIXED},
    "Lfm2": {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
    "Lfm2Moe": {
        "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1,
    },
    "GraniteMoeHybrid": {
        **_MAMBA, "layer_types": _MIXED, "num_local_experts": 0, "shared_intermediate_size": 48,
        "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
    "FalconH1": {**_MAMBA, "mamba_d_ssm": 64},
    "Bamba": {**_MAMBA, "attn_layer_indices": [1]},
    # transformers bounds a time step from below in passes over several tokens alone, so a bound makes them differ from
    # its own steps by a token.
    "NemotronH": {
        "time_step_min": 1e-9,
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "conv_kernel": 4,
    },
    "OlmoHybrid": {
        "layer_types": _MIXED, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
    },
}  # fmt: skip
# One of each kind of state.
FEW = ("Qwen3_5", "Lfm2", "GraniteMoeHybrid")


def build_hybrid(kind: str, **extra) -> nn.Module:
    """In evaluation mode, its norms and decays drawn too, so that a mix-up shows."""
    import transformers as t

    settings = {**_SIZES, **HYBRIDS[kind], **extra}
    if "layers_block_type" not in settings:
        settings["num_hidden_layers"] = 3
    config = getattr(t, f"{kind}TextConfig", None) or getattr(t, f"{kind}Config")
    torch.manual_seed(0)
    model = getattr(t, f"{kind}ForCausalLM")(config(**settings)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p += torch.randn(p.shape) * 0.1
            elif "conv" in name and p.dim() == 3:
                p.copy_(torch.randn(p.shape) * 0.5)
    return model


def with_adapter(model: nn.Module) -> nn.Module:
    """LoRA that says something, on every linear layer that peft allows."""
    from peft import LoraConfig

    from lowvram_grpo.policy.build import attach_lora

    # peft refuses it for some families, whose kernels read its weight past the module.
    left_out = ["out_proj"] if model.config.model_type in ("falcon_h1", "nemotron_h") else None
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=left_out, task_type="CAUSAL_LM")
    model = attach_lora(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model.eval()
