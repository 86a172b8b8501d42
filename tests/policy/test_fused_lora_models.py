"""Models whose LoRA layers are fused: adapters switched, saved and watched as ever, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from fused_models import IDS, fused, states
from passes import adapted, micro_batch, tiny, training_pass
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy import fused_lora, lora_product
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps
from lowvram_grpo.policy.dropout import training_mode
from lowvram_grpo.policy.fused_lora import fuse_lora
from lowvram_grpo.policy.own_forward import has_foreign_forward
from lowvram_grpo.policy.reference import Reference
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.policy.training_ops import fewer_launches
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapters import fast_adapters


def test_switched_mixed_and_merged_adapters_are_peft_s(tmp_path):
    pair = [adapted(tiny("Llama")) for _ in range(2)]
    fused(pair[1])
    references = [Reference(model) for model in pair]
    assert references[0].kind == "frozen adapter"

    def agree():
        expected, found = map(states, pair)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return found

    start = agree()
    for model in pair:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".default." in name:
                    p.mul_(1.5)
    assert not torch.allclose(agree(), start, atol=1e-3)
    with references[0].active(), references[1].active():
        torch.testing.assert_close(agree(), start, rtol=1e-4, atol=1e-5)
    for reference in references:
        reference.sync(0.5)
    with references[0].active(), references[1].active():
        agree()
    for model in pair:
        model.base_model.set_adapter(["default", "reference"])
    agree()  # both at once
    for model in pair:
        model.set_adapter("default")
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 0.3)
    agree()
    with pair[0].disable_adapter(), pair[1].disable_adapter():
        agree()
        for model in pair:  # a graph through the base alone
            model.train()
        found = [
            torch.autograd.grad(model(inputs_embeds=(x := torch.ones(1, 4, 32, requires_grad=True))).logits.sum(), x)[0]
            for model in pair
        ]
        torch.testing.assert_close(*found)
    for model in pair:
        model.eval().merge_adapter()
    agree()
    for model in pair:
        model.unmerge_adapter()
    agree()
    torch.testing.assert_close(*(states(model.merge_and_unload()) for model in pair), rtol=1e-4, atol=1e-5)


def test_what_is_saved_and_what_is_copied():
    model, other = adapted(tiny("Llama")), fused(adapted(tiny("Llama")))
    assert model.state_dict().keys() == other.state_dict().keys()
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(other).keys()
    expected = states(other)
    twin = copy.deepcopy(other)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert torch.equal(states(twin), expected) and not torch.equal(states(other), expected)
    fused(twin), fused(twin)
    assert (
        sum(isinstance(h.__self__, fused_lora._PassCache) for h in unwrap(twin).model._forward_pre_hooks.values()) == 1
    )
    assert torch.equal(states(twin), expected)


def test_a_model_that_is_gone_is_gone():
    model = fused(adapted(tiny("Llama")))
    states(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_rollouts_come_on_top():
    model = fused(adapted(tiny("Llama")))
    expected, own = states(model), [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
    for mode in ("fused", "merged", "off"):
        with torch.no_grad(), fast_adapters(model, mode):
            now = [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
            assert len(now) == len(own) == 14 and (mode == "off" or not set(now) & set(own))
            torch.testing.assert_close(states(model), expected, rtol=1e-4, atol=1e-5)
        assert own == [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
    torch.testing.assert_close(states(model), expected)
    cache = model.base_model.model.model.layers[0].mlp.down_proj._fused_lora_place[0].cache
    assert cache._made
    with torch.no_grad(), fast_adapters(model, "fused"):
        assert not cache._made  # a rollout has copies of its own


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_other_adapters_go_peft_s_own_way(settings, monkeypatch):
    model = attach_lora(
        tiny("Llama"), LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"], **settings)
    )
    for module in (fused_lora, lora_product):
        monkeypatch.setattr(module, "lora_products", None)
    fuse_lora(model.train(), nf4_kernel=False)
    torch.manual_seed(3)
    found = training_pass(model)[1]
    assert found and all(g.isfinite().all() for g in found.values())


def test_dropout_in_force_and_not():
    model = attach_lora(
        tiny("Llama"), LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"], lora_dropout=0.5)
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    plain = states(model.eval())
    fused(model.eval())
    torch.testing.assert_close(states(model), plain, rtol=1e-4, atol=1e-5)
    training_mode(model)
    assert not torch.allclose(states(model), states(model), atol=1e-3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # policy.dropout.disable_dropout
    torch.testing.assert_close(states(model), plain, rtol=1e-4, atol=1e-5)


def test_a_base_that_is_trained_or_watched_is_left_alone():
    model = adapted(tiny("Llama"))
    layers = unwrap(model).model.layers
    layers[0].mlp.down_proj.base_layer.weight.requires_grad_(True)
    layers[1].mlp.down_proj.base_layer.register_forward_hook(lambda module, args, out: out * 2)
    layers[0].self_attn.o_proj.forward = layers[0].self_attn.o_proj.forward  # accelerate's hooks
    assert fuse_lora(model, nf4_kernel=False) == 14 - 3


def test_no_phase_holds_more_than_before():
    def peaks(fuse):
        with torch.device("meta"):
            model = adapted(tiny("Llama", hidden_size=256, intermediate_size=640, num_hidden_layers=4))
        checkpoint_activations(model)
        if fuse:
            fused(model)
        batch = micro_batch([64] * 4, [64] * 4, [4], device="meta")
        with Ledger() as ledger:
            why_not(model)
            with ledger.phase("pass"):
                training_pass(model, batch, prompt_lengths=[64] * 4, completion_lengths=[64] * 4, group_sizes=[4])
        return ledger.phases["pass"].bytes

    assert peaks(True) <= peaks(False)


@pytest.mark.parametrize("tiled", [False, True])
def test_a_model_can_be_pickled(tiled):
    model = adapted(tiny("Llama"))
    if tiled:
        tile_mlps(model, 4)
    fewer_launches(model, "on", None)
    expected, kept = states(model), io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    assert torch.equal(states(torch.load(kept, weights_only=False)), expected)


def test_a_pass_in_inference_mode_leaves_nothing_that_others_can_not_use():
    model = fused(adapted(tiny("Llama")))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            unwrap(model)(IDS)
        training_pass(model)


def test_hooks_that_come_later_are_called():
    """Of the base's, the factors' and the layer's own, forwards and backwards."""
    plain, model = adapted(tiny("Llama")), fused(adapted(tiny("Llama")))
    found = []
    for each in (plain, model):
        layer, seen = unwrap(each).model.layers[1].self_attn, []
        layer.q_proj.base_layer.register_full_backward_hook(lambda *_, seen=seen: seen.append("base"))
        layer.k_proj.lora_A["default"].register_forward_hook(lambda *_, seen=seen: seen.append("A"))
        layer.v_proj.lora_B["default"].register_forward_hook(lambda module, args, out: 2 * out)
        layer.o_proj.register_full_backward_hook(lambda *_, seen=seen: seen.append("layer"))
        each.requires_grad_(False).get_input_embeddings().weight.requires_grad_()
        found.append((unwrap(each)(IDS).logits, seen))
        found[-1][0].square().sum().backward()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    assert found[0][1] == found[1][1] == ["A", "layer", "base"]


def test_who_wraps_a_forward_of_ours_is_somebody_else():
    model = adapted(tiny("Llama"))
    fewer_launches(model, "on", None)
    norm = unwrap(model).model.norm
    assert not has_foreign_forward(norm)
    add_hook_to_module(norm, ModelHook())
    assert has_foreign_forward(norm)
