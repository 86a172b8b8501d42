"""Heads of real architectures: the sweep must agree with the model's own logits."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from torch import nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.training.scoring import score

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2, "initializer_range": 0.4,
}  # fmt: skip


def build(kind: str):
    import transformers as t

    extra = {
        "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
        "Cohere": {"logit_scale": 0.3},
        "Granite": {"logits_scaling": 4.0},
        "Llama": {"tie_word_embeddings": False},
    }.get(kind, {})
    torch.manual_seed(0)
    config = getattr(t, f"{kind}Config")(**{**SMALL, **extra})
    return getattr(t, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Cohere", "Granite", "Mistral", "Phi3"])
def test_sweep_equals_the_models_own_logits(kind):
    model = build(kind)
    prompt, completion = torch.tensor([[3, 4, 5]]), torch.tensor([[6, 96, 8, 9]])
    scored = score(
        model,
        prompt,
        torch.ones_like(prompt),
        completion,
        torch.ones_like(completion),
        temperature=0.9,
        workspace_mib=1,
    )
    logits = model(torch.cat([prompt, completion], 1)).logits[:, 2:-1].float() / 0.9
    expected = torch.log_softmax(logits, -1).gather(2, completion[..., None])[..., 0]
    torch.testing.assert_close(scored.logps, expected, rtol=0, atol=2e-5)


def test_an_adapted_or_unknown_head_is_refused():
    adapted = get_peft_model(make_model(tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UserError, match="lm_head"):
        head_of(adapted.get_base_model())
    strange = make_model()
    strange.lm_head = nn.Sequential(strange.lm_head)
    with pytest.raises(UserError, match="Sequential"):
        head_of(strange)
