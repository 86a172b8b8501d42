"""What a step will take: arithmetic on what was measured, and a notice before the first one."""

from __future__ import annotations

import math
from itertools import count

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.training.continuation import planned_steps
from lowvram_grpo.training.pace import Pace, pace_of, spoken, timed

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def pace(**changed) -> Pace:
    """A rollout of 100 s, a forward pass over it of 10 s, which is all that one step learns from."""
    settings = {
        "sampling": 100.0, "scoring": 10.0, "completions": 16, "mean_length": 300.0, "limit": 300, "steps": 1,
        "updates": 1, "each_step": 2, "each_rollout": 0, "run": 500,
    }  # fmt: skip
    return Pace(**{**settings, **changed})


def test_what_an_estimate_leaves_out_is_said():
    said = lambda **changed: pace(**changed).sentence()
    assert "not counted" not in said()
    assert said(resampled=True).endswith(", groups that are sampled anew not counted.")
    assert said(resampled=True, evaluated=True).endswith(", evaluations and groups that are sampled anew not counted.")


@pytest.mark.parametrize("changed, seconds", [
    ({}, 100 + 20),
    ({"each_step": 4}, 100 + 40),
    ({"each_rollout": 2}, 100 + 20 + 20),
    ({"steps": 4, "updates": 4}, 25 + 5),
    ({"steps": 4, "updates": 2, "each_rollout": 1}, 25 + 10 + 2.5),  # num_iterations 2
    ({"scoring": None}, 100),
])  # fmt: skip
def test_a_step_is_its_share_of_the_rollout_and_its_own_passes(changed, seconds):
    assert pace(**changed).step == pytest.approx(seconds)


def test_what_is_said():
    assert pace().sentence() == (
        "estimate: a step will take about 2.0 min (16 completions of up to 300 tokens took 1.7 min to sample and "
        "reward), the 500 steps of this run about 17 h."
    )
    short = pace(mean_length=41.4, completions=1, run=1, evaluated=True).sentence()
    assert "1 completion of up to 300 tokens, 41 on average, took" in short and "; longer ones take longer)" in short
    assert short.endswith("the 1 step of this run about 2.0 min, evaluations not counted.")
    unscored = pace(scoring=None).sentence()
    assert "take at least 1.7 min" in unscored and "run at least 14 h" in unscored


@pytest.mark.parametrize("seconds, words", [
    (0.004, "0.004 s"), (0.34, "0.3 s"), (7.26, "7.3 s"), (9.96, "10 s"), (88, "88 s"), (90, "1.5 min"),
    (600, "10 min"), (5399, "90 min"), (5400, "1.5 h"), (40_000, "11 h"), (129_600, "1.5 days"), (3e6, "35 days"),
])  # fmt: skip
def test_two_digits_in_the_unit_that_fits(seconds, words):
    assert spoken(seconds) == words


def test_the_clock_stops_when_the_work_is_done():
    done, seconds = timed(lambda: "x", torch.device("cpu"), clock=count(5.0, 2.5).__next__)
    assert (done, seconds) == ("x", 2.5)


def trainer_of(config, tokenizer, dataset, peft_config=LORA, **settings) -> GRPOTrainer:
    return GRPOTrainer(make_model(), digit_share, config(**settings), dataset, processing_class=tokenizer,
                       peft_config=peft_config, observer=Quiet())  # fmt: skip


def seen(trainer, rollout, scored) -> Pace:
    run = planned_steps(trainer.grpo_args, trainer.train_dataset)
    return pace_of(trainer.learner, trainer.plan, rollout, scored, run=run)


@pytest.mark.parametrize("settings, peft_config, each_step, each_rollout", [
    ({}, LORA, 2, 0),
    ({"gradient_checkpointing": True}, LORA, 3, 0),
    ({"beta": 0.1}, LORA, 3, 0),  # the reference rides in the step's own sweep
    ({"beta": 0.1, "num_iterations": 2}, LORA, 2, 2),
    ({"steps_per_generation": 2}, LORA, 2, 1),
    ({}, None, 3, 0),
    ({"beta": 0.1}, None, 3, 1),
])  # fmt: skip
def test_the_passes_are_those_that_training_makes(
    config, tokenizer, dataset, settings, peft_config, each_step, each_rollout
):
    """Counted at the first layer, in the policy and in its frozen copy; a backward pass is one more where an adapter is
    trained, two where all weights are."""
    trainer = trainer_of(config, tokenizer, dataset, peft_config, max_steps=2, **{"beta": 0.0, **settings})
    models = [trainer.model.get_base_model()] if peft_config else [trainer.model]
    if trainer.reference is not None and trainer.reference.kind == "frozen copy":
        models.append(trainer.reference.model)
    calls = []
    rollout = trainer.collect(next(iter(trainer.get_train_dataloader())), 0)
    found = seen(trainer, rollout, (1, 1.0))
    assert (found.each_step, found.each_rollout) == (each_step, each_rollout)
    trainer.model.train()
    trainer._gradients(trainer._learnable(rollout)[0])  # each model is asked once whether prompts can be shared
    for model in models:
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    updates = trainer._learnable(rollout)
    once = len(calls)
    trainer._gradients(updates[0])
    assert once == each_rollout * sum(map(len, updates))
    backward = 1 if peft_config else 2
    assert (len(calls) - once) / len(updates[0]) + backward == each_step


def test_a_run_says_it_before_its_first_step(config, tokenizer, dataset):
    trainer = trainer_of(config, tokenizer, dataset, max_steps=3)
    trainer.train()
    (said,) = [text for text in trainer.observer.said if text.startswith("estimate: ")]
    assert "a step will take about" in said and "8 completions of up to 6 tokens" in said and "the 3 steps" in said
    quiet = trainer_of(config, tokenizer, dataset, max_steps=1, self_test=False)
    quiet.train()
    assert any("a step will take at least" in text for text in quiet.observer.said)
    nothing = trainer_of(config, tokenizer, dataset, max_steps=1, self_test=False, signal_check=False)
    nothing.train()
    assert not any(text.startswith("estimate") for text in nothing.observer.said)


def test_what_was_measured_is_what_is_counted(config, tokenizer, dataset):
    trainer = trainer_of(config, tokenizer, dataset, max_steps=4, steps_per_generation=2)
    rollout = trainer.collect(next(iter(trainer.get_train_dataloader())), 0)
    assert 0 < rollout.seconds < 60
    tokens = sum(map(len, rollout.batch.completion_ids)) + sum(map(len, rollout.batch.prompt_ids))
    found = seen(trainer, rollout, (tokens // 2, 3.0))
    assert found.scoring == pytest.approx(3.0 * tokens / (tokens // 2))
    assert (found.steps, found.updates, found.run, found.limit) == (2, 2, 4, 6)
    assert found.mean_length == pytest.approx(sum(map(len, rollout.batch.completion_ids)) / found.completions)
    assert seen(trainer, rollout, None).scoring is None and math.isfinite(found.step)
