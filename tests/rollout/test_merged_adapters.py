"""Adapters merged into the base weights while sampling: what is taken, and bits that come back as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_model
from lora_layers import Products, assert_close, forwards, of, two_steps, with_lora

from lowvram_grpo.memory import host
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout import adapters
from lowvram_grpo.rollout.adapters import fast_adapters


def test_an_interrupt_between_two_merges_leaves_the_model_as_it_was(monkeypatch):
    model = with_lora()
    before = copy.deepcopy(model.state_dict())
    merge, calls = adapters._merge, []

    def interrupted(weight, *rest):
        merge(weight, *rest)
        calls.append(weight)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "_merge", interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), fast_adapters(model, "merged"):
        pass
    assert len(calls) == 3 and forwards(model) == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_come_back_bit_for_bit(dtype, monkeypatch):
    monkeypatch.setattr(host, "_CHUNK", 5000)  # weights that span chunks, chunks that span weights
    monkeypatch.setattr(adapters, "_TILE", 500)
    model = with_lora(make_model(hidden_size=64, intermediate_size=128).to(dtype))
    odd = unwrap(model).model.layers[0].mlp.up_proj.base_layer.weight
    with torch.no_grad():
        odd[0, :4] = torch.tensor([float("inf"), -0.0, 1e-7, float("nan")])
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    merged, bits = 0, {2: torch.int16, 4: torch.int32}
    with torch.no_grad(), fast_adapters(model, "merged"):
        for name, p in model.named_parameters():
            merged += not torch.equal(p.nan_to_num(), before[name][1].nan_to_num())
    assert merged == 14
    for name, p in model.named_parameters():
        pointer, old = before[name]
        kind = bits[p.element_size()]
        assert p.data_ptr() == pointer and torch.equal(p.detach().view(kind), old.view(kind))


def test_a_merged_weight_is_the_sum_rounded_once():
    model = with_lora(make_model(hidden_size=64, intermediate_size=128).bfloat16())
    layer = unwrap(model).model.layers[1].self_attn.q_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + 1.5 * b @ a
    with torch.no_grad(), fast_adapters(model, "merged"):
        equal = layer.base_layer.weight == exact.bfloat16()
    assert equal.float().mean() > 0.999  # float32 is on the other side of a tie now and then


def test_a_weight_that_something_else_reads_is_fused_instead():
    base = make_model(hidden_size=64, intermediate_size=128)
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    model = with_lora(base)
    expected = two_steps(model)
    weight = unwrap(model).model.layers[0].mlp.up_proj.base_layer.weight
    with torch.no_grad(), fast_adapters(model, "merged"), Products() as products:
        before = weight.clone()
        assert_close(two_steps(model), expected)
        assert torch.equal(weight, before)
    assert len(products.shapes("addmm_")) == 2 * 2


def test_what_is_not_plain_is_left_alone():
    for settings in ({"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}):
        base = of("qwen2").unload()
        model = with_lora(base, **settings)
        with torch.no_grad(), fast_adapters(model, "merged"):
            assert forwards(model) == []
    model = with_lora()
    layers = unwrap(model).model.layers
    layers[1].mlp = layers[0].mlp  # the parent is shared, its layers are in one place
    layers[1].self_attn.v_proj = layers[0].self_attn.v_proj
    with torch.no_grad(), fast_adapters(model, "merged"):
        assert len(forwards(model)) == 3 + 7 - 1 and "forward" not in vars(layers[0].self_attn.v_proj)
    model = with_lora()
    with torch.no_grad():
        with model.disable_adapter(), fast_adapters(model, "merged"):
            assert forwards(model) == []
        model.merge_adapter()
        with fast_adapters(model, "fused"):
            assert forwards(model) == []
        model.unmerge_adapter()
        model = with_lora(lora_dropout=0.1).train()
        with fast_adapters(model, "fused"):
            assert forwards(model) == []
        with fast_adapters(model.eval(), "fused"):
            assert len(forwards(model)) == 14


def test_lm_head_and_embeddings_are_left_alone():
    base = make_model(hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    model = with_lora(base, target_modules=["lm_head", "embed_tokens", "o_proj"])
    with torch.no_grad(), fast_adapters(model, "merged"):
        assert all(name.endswith("o_proj") for name in forwards(model)) and len(forwards(model)) == 2
