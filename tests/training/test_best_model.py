"""The best of a run's weights, and a run that ends because none gets better; both across a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.training.best_model import best_of, stopped_early

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
EVALUATED = {
    "max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "num_generations_eval": 2, "load_best_model_at_end": True,
}  # fmt: skip


def falling(completions, trainer_state, **kwargs):
    """The reward of every evaluation is below that of the one before."""
    return [digit - trainer_state.global_step for digit in digit_share(completions)]


def made(config, dataset, tokenizer, reward=falling, callbacks=None, evaluated=None, **settings):
    args = config(**{**EVALUATED, **settings})
    return GRPOTrainer(
        make_model(), reward, args, dataset, dataset.select(range(2)) if evaluated is None else evaluated, tokenizer,
        peft_config=LORA, observer=Quiet(), callbacks=callbacks,
    )  # fmt: skip


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".default." in name}


def test_a_run_ends_once_nothing_gets_better(config, dataset, tokenizer):
    trainer = made(config, dataset, tokenizer, early_stopping=2)
    trainer.train()
    assert trainer.state.global_step == 3
    text = " ".join(trainer.observer.said)
    assert "stopping at step 3 of 6: eval_reward has not got better in 2 evaluations" in text
    best = best_of(trainer.args, trainer.state, trainer.callback_handler.callbacks)
    assert (best.step, best.metric, best.last, best.early) == (1, "eval_reward", 3, True)


def test_too_little_better_is_not_better(config, dataset, tokenizer):
    rising = lambda completions, trainer_state, **kwargs: [
        digit / 1e3 + trainer_state.global_step / 10 for digit in digit_share(completions)
    ]
    settings = {"early_stopping": 1, "load_best_model_at_end": False, "save_strategy": "no", "max_steps": 3}
    for threshold, steps in ((0.0, 3), (0.5, 2)):
        trainer = made(config, dataset, tokenizer, rising, early_stopping_threshold=threshold, **settings)
        trainer.train()
        assert trainer.state.global_step == steps


@pytest.mark.parametrize("of_transformers", [False, True], ids=["early_stopping", "a callback"])
def test_patience_goes_on_where_it_was(config, dataset, tokenizer, tmp_path, of_transformers):
    """Patience that began anew would see two evaluations more."""
    settings = {} if of_transformers else {"early_stopping": 2}
    callbacks = lambda: [EarlyStoppingCallback(2)] if of_transformers else None
    whole = made(config, dataset, tokenizer, callbacks=callbacks(), output_dir=str(tmp_path / "a"), **settings)
    whole.train()
    for step in (1, 2):
        shutil.copytree(tmp_path / "a" / f"checkpoint-{step}", tmp_path / "b" / f"checkpoint-{step}")
    shutil.rmtree(tmp_path / "a")
    again = made(config, dataset, tokenizer, callbacks=callbacks(), output_dir=str(tmp_path / "b"), **settings)
    again.train(resume_from_checkpoint=True)
    for trainer in (whole, again):
        assert (trainer.state.global_step, trainer.state.best_global_step) == (3, 1)
    assert again.state.best_metric == whole.state.best_metric
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


def test_a_run_that_was_over_takes_no_step(config, dataset, tokenizer, tmp_path):
    """Killed between its last checkpoint and its end."""
    whole = made(config, dataset, tokenizer, early_stopping=1)
    whole.train()
    # Elsewhere by now: the state has the best checkpoint by its path.
    checkpoint = (tmp_path / "run").rename(tmp_path / "moved") / "checkpoint-2"
    assert stopped_early(checkpoint, 1) and not stopped_early(checkpoint, 2) and not stopped_early(checkpoint, 0)
    again = made(config, dataset, tokenizer, early_stopping=1, output_dir=str(tmp_path / "moved"))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and "has ended the run at checkpoint-2" in " ".join(again.observer.said)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    best = best_of(again.args, again.state, again.callback_handler.callbacks)
    assert best.early and best.step == 1


def test_patience_may_come_with_a_resume(config, dataset, tokenizer):
    made(config, dataset, tokenizer, max_steps=2).train()
    trainer = made(config, dataset, tokenizer, early_stopping=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4  # best at 1, before; 3 and 4 are counted


def test_the_best_is_kept_between_two_saves_and_beyond_their_limit(config, dataset, tokenizer, tmp_path):
    trainer = made(config, dataset, tokenizer, save_steps=2, save_total_limit=1)
    trainer.train()
    # transformers would save nothing at step 1, and leave the last weights without a word.
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_resume_does_not_start_with_an_evaluation(config, dataset, tokenizer):
    first = made(config, dataset, tokenizer, eval_on_start=True, max_steps=1)
    first.train()
    trainer = made(config, dataset, tokenizer, eval_on_start=True, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_reward" in row]
    assert evaluated == [0, 1, 2]


def test_one_of_several_evaluation_data_decides(config, dataset, tokenizer):
    both = {"easy": dataset.select([0]), "hard": dataset.select([1])}
    settings = {"early_stopping": 1, "metric_for_best_model": "hard_reward"}
    trainer = made(config, dataset, tokenizer, evaluated=both, **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    rows = {name for row in trainer.state.log_history for name in row}
    assert {"eval_easy_reward", "eval_hard_reward", "eval_hard_rewards/falling/mean"} <= rows


def test_nothing_to_go_by_is_said_before_a_model_is_loaded(config, dataset, tokenizer):
    for settings, words in (
        ({"early_stopping": 2, "eval_strategy": "no", "load_best_model_at_end": False}, "early_stopping is set, but"),
        ({"save_strategy": "no"}, "save_strategy no and eval_strategy steps"),
        ({"save_strategy": "epoch"}, "set save_strategy to steps or best"),
        ({"early_stopping": -1}, "early_stopping is -1"),
    ):
        with pytest.raises(UserError, match=words):
            config(**{**EVALUATED, **settings})
    with pytest.raises(UserError, match="EarlyStoppingCallback is given, but nothing is evaluated"):
        GRPOTrainer("no/model", digit_share, config(), dataset, callbacks=[EarlyStoppingCallback()])
    args = config(eval_strategy="steps", eval_steps=1)
    GRPOTrainer(make_model(), digit_share, args, dataset, dataset, tokenizer, callbacks=[EarlyStoppingCallback()])
    assert args.metric_for_best_model == "eval_reward"
