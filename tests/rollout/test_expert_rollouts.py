"""Rollouts of mixtures of experts in 4 bits: greedy completions are generate's, and the same wherever experts are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling

sys.path.append(str(Path(__file__).parents[1] / "policy"))
from mixtures import loaded, mixture

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_greedy_completions_are_those_of_generate_wherever_experts_are(tmp_path, family):
    from peft import LoraConfig

    mixture(family, initializer_range=0.3).save_pretrained(tmp_path / "model")
    found = {}
    for waiting in ("off", "auto", 2):
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(2)
        model = attach_lora(loaded(tmp_path / "model", expert_offload=waiting), config)
        engine = RolloutEngine(model, Sampling(max_new_tokens=8, eos_ids=(1,), pad_id=0, temperature=0), rows=4)
        found[waiting] = engine.generate(PROMPTS, 2, seed=0).completion_ids
        for i, prompt in enumerate(PROMPTS):
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
            assert found[waiting][2 * i] == found[waiting][2 * i + 1] == expected.tolist()
        assert engine.fallback is None if hasattr(engine, "fallback") else True
    assert found["off"] == found["auto"] == found[2]
    assert len({tuple(c) for c in found["off"]}) == 3
