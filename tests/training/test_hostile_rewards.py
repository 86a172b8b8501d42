"""GRPOTrainer with reward functions that do what they must not."""

from __future__ import annotations

import os
import random

import pytest
import torch
from conftest import Quiet, digit_share, make_model, make_tokenizer
from peft import LoraConfig

from lowvram_grpo.errors import UserError
from lowvram_grpo.training.trainer import GRPOTrainer


def trained(reward, config, dataset, **settings):
    observer = Quiet()
    trainer = GRPOTrainer(
        make_model(), [digit_share, reward], config(reward_weights=[1.0, 0.0], **settings), dataset,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"), observer=observer,
    )  # fmt: skip
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return trainer, weights, observer.said


def harmless(completions, **kwargs):
    return [0.0] * len(completions)


def hostile(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
    n = len(completions)
    for given in (prompts, completions, completion_ids, answer):
        given.clear()
    trainer_state.global_step = 10**6
    torch.manual_seed(0)
    random.seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.chdir("/")
    os.environ["OMP_NUM_THREADS"] = "many"
    if hasattr(os, "fork"):
        os.fork()
    return [0.0] * n


def test_a_run_with_a_hostile_reward_is_the_same_run(config, dataset):
    """Dropout draws from the global generator, so that is compared too."""
    place = os.getcwd()
    _, expected, _ = trained(harmless, config, dataset)
    trainer, found, _ = trained(hostile, config, dataset)
    assert os.getcwd() == place and trainer.state.global_step == 2
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_errors_are_none_and_metrics_count_them(config, dataset):
    def breaks(completions, **kwargs):
        if len(completions) > 1 or "1" in completions[0]:
            raise ValueError("a digit")
        return [1.0]

    trainer, _, said = trained(breaks, config, dataset, reward_errors="none")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2 and all(0 <= row["rewards/breaks/failed"] <= 8 for row in rows)
    assert rows[0]["rewards/digit_share/failed"] == 0
    assert sum("raised ValueError: a digit" in sentence for sentence in said) == 1


def test_without_it_the_run_ends_with_its_sentence(config, dataset):
    def breaks(completions, **kwargs):
        raise ValueError("x")

    with pytest.raises(UserError, match="'breaks' raised ValueError: x"):
        trained(breaks, config, dataset)
