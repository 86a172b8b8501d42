"""Tiny random models of the architectures that the engine lists."""

from __future__ import annotations

import torch

# (architecture, what makes it special); windows are shorter than the prompts of the tests.
LISTED = [
    ("Llama", {}),
    ("Qwen2", {}),
    ("Qwen3", {}),
    ("Mistral", {"sliding_window": 8}),
    ("Gemma2", {"sliding_window": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    ("Gemma3", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    ("Phi", {}),
    ("Phi3", {"sliding_window": None}),
    ("SmolLM3", {}),
    ("Granite", {"logits_scaling": 4.0}),
    ("GPT2", {}),
]


def build(kind: str, **extra):
    import transformers as t

    torch.manual_seed(0)
    small = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 2, "initializer_range": 0.4,
    }  # fmt: skip
    if kind == "GPT2":
        small = {
            k: small[k] for k in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id", "initializer_range")
        }
        small |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return t.GPT2LMHeadModel(t.GPT2Config(**{**small, **extra})).eval()
    config = t.Gemma3TextConfig if kind == "Gemma3" else getattr(t, f"{kind}Config")
    return getattr(t, f"{kind}ForCausalLM")(config(**{**small, **extra})).eval()


def with_lora(model):
    """An adapter that says something, on every linear layer."""
    from peft import LoraConfig, get_peft_model

    modules = ["c_attn", "c_proj", "c_fc"] if model.config.model_type == "gpt2" else "all-linear"
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()
