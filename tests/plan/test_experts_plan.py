"""A mixture of experts on paper: adapters of expert weights, and what its router's loss costs."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig

from lowvram_grpo.plan.counting import Blueprint, count
from lowvram_grpo.plan.stand_in import StandIn
from tests.plan.measured import settings

CONFIG = Qwen3MoeConfig(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}


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
