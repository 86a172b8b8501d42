"""The load-balancing loss of mixtures of experts, from the decoder alone, against the model's own."""

from __future__ import annotations

import pytest
import torch
from tiny import SIZES
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.experts import router_loss_of

EXPERTS = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen2_moe": (Qwen2MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                   "shared_expert_intermediate_size": 24}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2,
                               "layer_types": ["full_attention"] * 2}),
}  # fmt: skip


def experts(name, **overrides):
    kind, settings = EXPERTS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**SIZES, **settings, **overrides})).eval()


def padded():
    torch.manual_seed(1)
    ids, mask = torch.randint(2, 90, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :3] = mask[1, 7:] = 0
    return ids, mask


def ours(router, model, ids, mask):
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    with router.watched() as passes:
        causal_lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return router.loss(passes[-1], mask)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_loss_and_gradient_are_the_models_own(name, checkpointing):
    from peft import LoraConfig

    base = experts(name)
    model = attach_lora(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)  # B of a new adapter is 0, and leaves A without a gradient
    trained = [p for p in model.parameters() if p.requires_grad]
    ids, mask = padded()
    theirs = base(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    wanted = torch.autograd.grad(theirs, trained)
    if checkpointing:
        checkpoint_activations(model)
    router = router_loss_of(base, None)
    assert router.coefficient == base.config.router_aux_loss_coef
    found = ours(router, model, ids, mask)
    torch.testing.assert_close(found, theirs)
    for a, b in zip(torch.autograd.grad(found, trained), wanted):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted)


def test_padding_does_not_count():
    model = experts("qwen3_moe")
    ids, mask = padded()
    router = router_loss_of(model, 1.0)
    with torch.no_grad():
        before = ours(router, model, ids, mask)
        changed = torch.where(mask.bool(), ids, 5)
        torch.testing.assert_close(ours(router, model, changed, mask), before)
        assert (ours(router, model, changed, torch.ones_like(mask)) - before).abs() > 1e-4


def test_the_decoder_is_left_as_it_was():
    model = experts("mixtral")
    router = router_loss_of(model, None)
    with pytest.raises(RuntimeError), router.watched():
        raise RuntimeError
    assert not model.model._forward_hooks and not model.model._forward_pre_hooks
    assert model.model(input_ids=padded()[0]).router_logits is None


def test_what_has_no_such_loss():
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    assert router_loss_of(llama, None) is None and router_loss_of(llama, 0.0) is None
    with pytest.raises(UserError, match=r"router_aux_loss_coef is 0\.1, but LlamaForCausalLM is no mixture of experts"):
        router_loss_of(llama, 0.1)
    mixtral = experts("mixtral")
    assert router_loss_of(mixtral, 0.0) is None
    assert router_loss_of(mixtral, 0.5).coefficient == 0.5
    assert router_loss_of(experts("mixtral", router_aux_loss_coef=0.0), None) is None
    # Its experts are chosen by two keys each, and its loss takes other arguments.
    doge = AutoModelForCausalLM.from_config(DogeConfig(**SIZES, is_moe=True, num_experts=16, num_experts_per_tok=2))
    assert router_loss_of(doge, None) is None
    with pytest.raises(UserError, match="no load-balancing loss for DogeForCausalLM"):
        router_loss_of(doge, 0.1)
