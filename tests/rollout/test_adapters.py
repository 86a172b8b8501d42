"""LoRA layers while sampling: the same numbers by less work, and the model afterwards as it was."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from conftest import make_model, make_tokenizer
from lora_layers import (
    CONFIGS,
    IDS,
    LORA,
    Products,
    assert_close,
    forwards,
    inside,
    of,
    randomize,
    two_steps,
    with_lora,
)
from peft import LoraConfig
from torch import nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm
from lowvram_grpo.policy.reference import REFERENCE, Reference
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapters import fast_adapters


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("mode", ["auto", "fused", "merged"])
def test_the_numbers_are_those_of_peft(architecture, mode):
    model = of(architecture)
    expected = two_steps(model)
    with torch.no_grad(), model.disable_adapter():
        assert (two_steps(model)[1] - expected[1]).abs().max() > 0.01
    assert_close(inside(model, mode), expected)
    assert all(torch.equal(a, b) for a, b in zip(two_steps(model), expected))


def test_every_layer_is_taken_and_given_back():
    model = with_lora()
    with torch.no_grad(), fast_adapters(model, "fused"):
        assert len(forwards(model)) == 14
    assert forwards(model) == []
    with torch.no_grad(), fast_adapters(model, "off"):
        assert forwards(model) == []


@pytest.mark.parametrize("mode", ["fused", "merged"])
def test_the_active_adapter_counts_where_there_are_two(mode):
    model = with_lora()
    reference = Reference(model)
    assert reference.kind == "frozen adapter" and REFERENCE in model.peft_config
    frozen = two_steps(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".default." in name:
                p.mul_(1.5)
    moved = two_steps(model)
    assert_close(inside(model, mode), moved)
    with reference.active() as other:
        assert_close(inside(other, mode), frozen)
    assert not torch.allclose(moved[0], frozen[0], atol=1e-3)
    assert_close(inside(model, mode), moved)


def test_weights_are_read_anew_on_each_entry():
    model = with_lora()
    inside(model, "fused")
    randomize(model, seed=2)
    assert_close(inside(model, "fused"), two_steps(model))


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"rank_pattern": {"k_proj": 2, "up_proj": 3}}])
def test_other_scalings_and_unequal_ranks(settings):
    model = with_lora(**settings)
    assert_close(inside(model, "fused"), two_steps(model))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_bases(tmp_path, quantization):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = bitsandbytes_config(quantization, torch.float32)
    base = load_causal_lm(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32, quantization_config=config)
    model = with_lora(base)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    for mode in ("fused", "merged"):
        with torch.no_grad(), fast_adapters(model, mode):
            assert len(forwards(model)) == 14
        assert_close(inside(model, mode), two_steps(model))
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    model = with_lora()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype) if not parameter.requires_grad else parameter.data
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    with Products() as products:
        assert_close(inside(model, "fused", autocast), two_steps(model, autocast), 0.03)
    assert len(products.shapes("addmm_")) == 2 * 14
    with torch.no_grad(), fast_adapters(model, "fused"):  # entered outside of it: slower, and right
        found = two_steps(model, autocast)
    assert_close(found, two_steps(model, autocast), 0.03)


def test_a_16_bit_base_without_autocast_has_its_adapter_in_float32_as_in_training():
    model = with_lora(make_model(hidden_size=64, intermediate_size=128).bfloat16())
    assert unwrap(model).dtype == torch.bfloat16
    with torch.no_grad(), fast_adapters(model, "fused"):
        found = two_steps(model)
    assert_close(found, two_steps(model), 0.005)


@pytest.mark.parametrize("mode", ["fused", "merged"])
def test_the_model_can_be_freed_afterwards(mode):
    model = with_lora()
    inside(model, mode)
    layer = weakref.ref(unwrap(model).model.layers[0].mlp.up_proj.lora_A["default"].weight)
    del model
    gc.collect()
    assert layer() is None


def test_a_prefill_holds_no_more_than_by_peft():
    model = with_lora()
    x = torch.randn(4, 64, 64)
    mlp = unwrap(model).model.layers[0].mlp
    peaks = {}
    for mode in ("off", "fused"):
        with torch.no_grad(), fast_adapters(model, mode), Ledger() as ledger:
            mlp(x)
        peaks[mode] = ledger.peak
    assert peaks["fused"] < peaks["off"]


@pytest.mark.parametrize("mode", ["fused", "merged"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_model_as_it_was(mode, error):
    model = with_lora()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error), torch.no_grad(), fast_adapters(model, mode):
        assert forwards(model)
        raise error
    assert forwards(model) == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values()))


def test_two_active_adapters_are_left_to_peft():
    model = with_lora()
    model.add_adapter("more", LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "more"])
    with torch.no_grad(), fast_adapters(model, "fused"):
        assert forwards(model) == []


def test_gradients_take_the_slow_way():
    model = with_lora()
    with torch.no_grad(), fast_adapters(model, "fused"), torch.enable_grad():
        unwrap(model)(IDS).logits.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    unwrap(model)(IDS).logits.sum().backward()
    assert len(found) == 28 and all(torch.equal(found[n], p.grad) for n, p in model.named_parameters() if n in found)


@pytest.mark.parametrize("mode", ["fused", "merged"])
def test_a_memory_plan_can_run_through_it(mode):
    model = with_lora(make_model(hidden_size=64, intermediate_size=128).bfloat16()).to("meta")
    decoder = unwrap(model).model
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    with torch.no_grad(), Ledger() as ledger, fast_adapters(model, mode):
        assert (ledger.categories.get("adapter", 0) > 0) == (mode == "fused")
        assert decoder(ids).last_hidden_state.shape == (2, 7, 64)


def test_a_model_without_an_adapter_is_no_matter():
    model = make_model()
    assert isinstance(model, nn.Module)
    expected = two_steps(model)
    assert all(torch.equal(a, b) for a, b in zip(inside(model, "auto"), expected))


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match="'fast'"), fast_adapters(make_model(), "fast"):
        pass


def test_the_benchmark_runs(model_dir, capsys):
    from time_adapters import main

    main([model_dir, "--device", "cpu", "--rounds", "1", "--steps", "1", "--context", "9"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["off", "fused", "merged"]
