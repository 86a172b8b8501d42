"""TRL's trainer with our sweep: the losses, norms and metrics of TRL's own path."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is what is switched on: pip install -e '.[test]' on Python 3.11 or later")

import torch
from beside_trl import OFF_POLICY, agree, pair


def lora(**more):
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0, **more)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.04, **OFF_POLICY},
        {"importance_sampling_level": "sequence", **OFF_POLICY},
        {"top_entropy_quantile": 0.4, "beta": 0.02},
        {"entropy_coef": 0.05},
        {"mask_truncated_completions": True, "steps_per_generation": 4, "pad_to_multiple_of": 4},
        {"gradient_checkpointing": True, "cast_lm_head_to_fp32": True},
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
@pytest.mark.parametrize("adapter", [None, lora], ids=["all weights", "lora"])
def test_the_same_steps(tmp_path, settings, adapter):
    agree(*pair(tmp_path, adapter=adapter, **settings))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"])
def test_loss_types(tmp_path, loss_type):
    agree(*pair(tmp_path, adapter=lora, loss_type=loss_type, beta=0.03, **OFF_POLICY))
