"""A mixture of experts on paper: adapters of expert weights, and what its router's loss costs."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lowvram_grpo.plan.counting import Blueprint, count
from lowvram_grpo.plan.fitting import plan_on_paper
from lowvram_grpo.plan.prediction import predict
from lowvram_grpo.plan.stand_in import StandIn
from lowvram_grpo.policy import quantized_experts
from lowvram_grpo.recipe.resolve import resolve
from tests.conftest import make_tokenizer
from tests.plan.measured import measured, settings

CONFIG = Qwen3MoeConfig(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
# Qwen/Qwen3-30B-A3B
LARGE = Qwen3MoeConfig(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    norm_topk_prob=True, max_position_embeddings=40960, tie_word_embeddings=False,
)  # fmt: skip
GIB = 2**30


def counted(tmp_path, dtype=torch.bfloat16, **given):
    args = settings(
        tmp_path / "run", num_generations=4, prompts_per_step=2, per_device_train_batch_size=4, max_prompt_length=40,
        max_completion_length=24, optim="adamw_torch", workspace_mib=1, **given,
    )  # fmt: skip
    phases = count(Blueprint(CONFIG, "none", dtype, LORA, "cuda", longest_prompt=40), args)
    return {name: peak.bytes for name, peak in phases.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_routers_loss_runs_each_prompt_once_a_completion(tmp_path, dtype):
    real = torch.autocast
    balanced = counted(tmp_path, dtype)
    shared = counted(tmp_path, dtype, router_aux_loss_coef=0.0)
    apart = counted(tmp_path, dtype, router_aux_loss_coef=0.0, shared_prefix="off")
    assert shared["backward"] < apart["backward"] <= balanced["backward"]
    assert torch.autocast is real


def test_autocast_that_a_library_asks_for_is_that_of_the_device_which_is_stood_in_for():
    weight, x = torch.ones(2, 2, device="meta"), torch.ones(2, 2, device="meta")
    stand_in = StandIn("cuda", torch.bfloat16)
    with stand_in, stand_in.for_libraries(), stand_in.autocast():
        assert (x @ weight).dtype == torch.bfloat16
        with torch.autocast(device_type="meta", enabled=False):
            assert (x @ weight).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert (x @ weight).dtype == torch.bfloat16
    with stand_in, stand_in.for_libraries(), torch.autocast(device_type="meta"):
        assert (x @ weight).dtype == torch.bfloat16


@pytest.mark.parametrize("waiting", ["off", "auto", 20])
def test_the_bytes_of_experts_in_4_bits_are_those_of_a_real_run(tmp_path, waiting, monkeypatch):
    """Every phase within 1 %, of experts that all have a place on the device, that have none, and in between. Nobody
    knows how many tokens choose an expert, so a tile of them is counted, here a small one."""
    monkeypatch.setattr(quantized_experts, "TILE", 8)
    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=32, num_experts_per_tok=2, moe_intermediate_size=64,
        initializer_range=0.02, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    args = settings(
        tmp_path / "run", num_generations=4, prompts_per_step=2, per_device_train_batch_size=4, max_prompt_length=40,
        max_completion_length=24, optim="adamw_torch", workspace_mib=1, router_aux_loss_coef=0.0,
        expert_offload=waiting,
    )  # fmt: skip
    prompts = [" ".join("abcdefghij" * 4), " ".join("abcdefghijk" * 3 + "lmnopqr")]
    lora = {"r": 4, "target_modules": "all-linear"}
    real = measured(str(tmp_path / "model"), args, make_tokenizer(), prompts, "nf4", lora)
    found = predict(Blueprint(config, "nf4", torch.float32, lora, "cpu", longest_prompt=40), args, exact=True)
    for phase, size in found.phases.items():
        assert size == pytest.approx(real[phase].bytes, rel=0.01), phase


@pytest.mark.parametrize("card, waiting", [(8, range(80, 120)), (12, range(60, 90)), (16, range(40, 70)), (24, None)])
def test_a_30b_of_experts_fits_small_cards(card, waiting):
    """Places for experts fill what is free, the rest waits; where all fit, none does."""
    began = time.process_time()
    plan = plan_on_paper(resolve({"model": "x", "preset": f"{card}gb"}, None), LARGE, card)
    assert time.process_time() - began < 10
    assert plan.fits
    if waiting is None:
        assert plan.fetching is None and plan.as_json()["experts"] is None
        return
    assert [str(rung) for rung in plan.rungs] == ["expert_offload=auto"]
    assert plan.recipe.training["expert_offload"] in waiting
    assert plan.prediction.peak > 0.88 * plan.budget
    assert plan.fetching.host == pytest.approx(29.0e9 * 0.516, rel=0.01)
    assert plan.prediction.host["weights"] == pytest.approx(plan.fetching.host, rel=0.08)  # locked in powers of two
    assert f"{plan.fetching.waiting} of 128 experts a layer wait" in plan.fetching.words
    assert "not measured" in plan.fetching.words and plan.as_json()["experts"]["waiting"] in waiting


def test_a_number_in_the_place_of_auto_is_predicted_as_it_runs():
    """Places are added to a prediction without any; all layers counted, the same comes out."""
    from lowvram_grpo.memory.cards import typical
    from lowvram_grpo.plan.planner import Planner

    planner = Planner(LARGE, card=typical(12))
    recipe = resolve({"model": "x", "preset": "12gb", "expert_offload": "auto"}, None)
    plan = planner.plan(recipe, round(10.3 * GIB))
    assert not plan.rungs and 0 < plan.recipe.training["expert_offload"] < 128
    assert planner.predict(plan.recipe).peak == pytest.approx(plan.prediction.peak, rel=2e-3)
    assert planner.plan(recipe, round(22 * GIB)).recipe.training["expert_offload"] == "off"
