"""all-linear: what it trains, what it leaves out, and that peft makes of it what is meant."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.lora_targets import linear_layers, with_targets
from tests.families.zoo import NAMED, tiny, tiny_whole

LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted(model: nn.Module) -> set[str]:
    """Last names of what has an adapter: layers, and parameters of experts."""
    return {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize(
    "family,trained",
    [
        ("Qwen2.5", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("Qwen3 MoE", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("Qwen3-Next", {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "out_proj"}),
        ("Granite 4 hybrid", {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "input_linear", "output_linear"}),
    ],
)
def test_neither_routers_nor_experts_nor_gates_of_a_recurrence(family, trained):
    assert adapted(attach_lora(tiny(NAMED[family]), LoraConfig(**LORA))) == trained


def test_peft_alone_would_train_the_router_and_every_expert():
    """Why names are given to it; where this fails, the reason is gone."""
    found = adapted(get_peft_model(tiny(NAMED["Qwen3 MoE"]), LoraConfig(**LORA)))
    assert {"gate", "experts"} <= found


def test_names_stay_those_that_were_given():
    config = LoraConfig(r=2, target_modules=["in_proj_a", "q_proj"])
    assert adapted(attach_lora(tiny(NAMED["Qwen3.5"]), config)) == {"in_proj_a", "q_proj"}
    assert with_targets(tiny(NAMED["Qwen3.5"]), config).target_modules == {"in_proj_a", "q_proj"}
    assert LoraConfig(**LORA).target_modules == "all-linear"


def test_towers_of_a_multimodal_model_are_left_alone():
    layers = linear_layers(tiny_whole(NAMED["Gemma 3"]))
    outside = {name for name, why in layers.items() if why == "of another modality"}
    assert outside and outside == {name for name in layers if "language_model" not in name}


@pytest.mark.parametrize("family", ["Qwen3-Next", "Granite 4 hybrid MoE", "LFM2 MoE"])
def test_peft_loads_what_was_saved(family, tmp_path):
    """An adapter whose names peft reads otherwise would come back as another."""
    model = attach_lora(tiny(NAMED[family]), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny(NAMED[family]), tmp_path).eval()(ids).logits
    torch.testing.assert_close(again, expected)
