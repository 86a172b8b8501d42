"""A run whose gradient never reaches what it trains is stopped; one that has nothing to learn from yet is not."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import Quiet, digit_share
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.training.gradient_check import GradientCheck, could_teach

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def trained(config, dataset, tokenizer, model, reward=digit_share, cut_off=True, **settings):
    args = config(max_steps=3, beta=0.0, **settings)
    trainer = GRPOTrainer(model, reward, args, dataset, processing_class=tokenizer, peft_config=LORA, observer=Quiet())
    if cut_off:
        for p in (p for p in trainer.model.parameters() if p.requires_grad):
            p.register_hook(torch.zeros_like)
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_that_never_arrives_is_an_error(config, dataset, tokenizer, model, checkpointing):
    with pytest.raises(UserError, match="exactly zero in the first 2 steps although the rewards differ"):
        trained(config, dataset, tokenizer, model, gradient_checkpointing=checkpointing)


@pytest.mark.parametrize("settings", [{"warmup_steps": 3}, {"learning_rate": 0.0}, {"max_grad_norm": 0.0}])
def test_a_rate_of_zero_is_none(config, dataset, tokenizer, model, settings):
    trainer = trained(config, dataset, tokenizer, model, cut_off=False, **settings)
    assert trainer.state.global_step == 3


def test_dead_groups_are_none(config, dataset, tokenizer, model):
    dead = lambda completions, **kwargs: [0.5] * len(completions)
    assert trained(config, dataset, tokenizer, model, dead).state.global_step == 3


def test_completions_that_are_all_masked_are_none(config, dataset, tokenizer, model):
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    assert trained(config, dataset, tokenizer, model, mask_truncated_completions=True).state.global_step == 3


def test_the_same_completion_with_different_rewards_is_none(config, dataset, tokenizer, model):
    """Their gradients cancel out: a noisy reward on a sampler that is as good as greedy."""
    noise = itertools.count()
    noisy = lambda completions, **kwargs: [float(next(noise) % 3) for _ in completions]
    assert trained(config, dataset, tokenizer, model, noisy, temperature=1e-4).state.global_step == 3


def test_clipped_tokens_are_none(config, dataset, tokenizer, model):
    trainer = trained(config, dataset, tokenizer, model, cut_off=False)
    update = trainer.cut(trainer.collect([dataset[0], dataset[1]], 0), 1)[0]
    trainer.model.zero_grad()
    check = GradientCheck("adamw_torch")
    for clipped in (0.5, 0.0, 1.0):
        check.look(trainer.model, update, live=True, clipped=clipped)
    with pytest.raises(UserError, match="exactly zero"):
        check.look(trainer.model, update, live=True, clipped=0.0)
    GradientCheck("galore_adamw_layerwise").look(trainer.model, update, live=True, clipped=0.0)


def test_could_teach_needs_texts_that_differ(config, dataset, tokenizer, model):
    trainer = trained(config, dataset, tokenizer, model, cut_off=False)
    rollout = trainer.collect([dataset[0], dataset[1]], 0)
    assert could_teach(rollout)
    rollout.batch.completion_ids[:] = [rollout.batch.completion_ids[0]] * 8
    assert not could_teach(rollout)
