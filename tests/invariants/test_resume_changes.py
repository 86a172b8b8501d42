"""A run that is resumed with other settings: what was really used, read inside the process, is what was asked for."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import Quiet, digit_share, make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from lowvram_grpo import GRPOConfig, GRPOTrainer
from lowvram_grpo.errors import CantWrite, UserError
from lowvram_grpo.run.checkpoints import damage

PROMPTS = [" ".join("abcdefghijklmnopqrstuvwxyz"[i : i + 1 + i % 3]) for i in range(12)]
BASE = {
    "use_cpu": True, "num_generations": 4, "prompts_per_step": 2, "per_device_train_batch_size": 8,
    "max_completion_length": 4, "temperature": 1.0, "max_steps": 6, "learning_rate": 1e-2, "report_to": "none",
    "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False,
    "shuffle_dataset": False, "self_test": False, "signal_check": False,
}  # fmt: skip


class Used(TrainerCallback):
    """What each optimizer step really used."""

    def __init__(self):
        self.steps: dict[int, dict] = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        group = dict(optimizer.param_groups[0])
        counts = {int(s["step"]) for s in optimizer.state.values()}
        self.steps[state.global_step + 1] = {**group, "moments": counts, "class": type(optimizer.optimizer).__name__}


class Watched(GRPOTrainer):
    """Keeps the prompts of each rollout, by the step that it is made for."""

    def collect(self, rows, step, mode="train"):
        self.sampled = {**getattr(self, "sampled", {}), step + 1: [row["prompt"] for row in rows]}
        return super().collect(rows, step, mode)


def trainer(folder, *, data=None, reward=digit_share, **settings):
    args = GRPOConfig(output_dir=str(folder), **{**BASE, **settings})
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    used, said = Used(), Quiet()
    made = Watched(
        make_model(), reward, args, Dataset.from_dict({"prompt": data or PROMPTS}), None, make_tokenizer(),
        callbacks=[used], peft_config=lora, observer=said,
    )  # fmt: skip
    made.used, made.said = used.steps, said.said
    return made


def rates(made):
    """The logged learning rates, which must be those that the optimizer had."""
    logged = {row["step"]: row["learning_rate"] for row in made.state.log_history if "learning_rate" in row}
    for step, group in made.used.items():
        assert logged[step] == group["lr"], step
    return [made.used[step]["lr"] for step in sorted(made.used)]


def in_order(made):
    """The prompts of all rollouts."""
    return [prompt for prompts in made.sampled.values() for prompt in prompts]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Checkpoints 1 to 6 of a run that ended."""
    folder = tmp_path_factory.mktemp("begun")
    trainer(folder).train()
    return folder


@pytest.fixture(scope="module")
def in_rollouts(tmp_path_factory):
    """The same with rollouts that serve two steps."""
    folder = tmp_path_factory.mktemp("rollouts")
    trainer(folder, num_iterations=2, max_steps=3).train()
    return folder


def resumed(tmp_path, folder, step, **settings):
    made = trainer(tmp_path / "run", **{"save_strategy": "no", **settings})
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return made


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({"learning_rate": 1e-4}, [1e-4 * left / 6 for left in (2, 1)]),
        ({"max_steps": 7}, [1e-2 * left / 7 for left in (3, 2, 1)]),
        ({"lr_scheduler_type": "cosine"}, [1e-2 * 0.5 * (1 + math.cos(math.pi * s / 6)) for s in (4, 5)]),
        ({"warmup_ratio": 0.8}, [1e-2 * 4 / 5, 1e-2]),
        ({"max_steps": -1, "num_train_epochs": 1.2}, [1e-2 * left / 8 for left in (4, 3, 2, 1)]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_learning_rate_is_todays_at_its_place(begun, tmp_path, settings, expected):
    made = resumed(tmp_path, begun, 4, **settings)
    assert rates(made) == pytest.approx(expected)
    assert made.used[5]["moments"] == {4}  # and Adam goes on counting


def test_a_run_that_has_ended_goes_on_above_rate_zero(begun, tmp_path):
    made = resumed(tmp_path, begun, 6, max_steps=8)
    assert rates(made) == pytest.approx([1e-2 * 2 / 8, 1e-2 * 1 / 8])


def test_the_optimizers_settings_are_todays(begun, tmp_path):
    settings = {"weight_decay": 0.3, "adam_beta1": 0.5, "adam_epsilon": 1e-3, "optim": "adamw_torch_fused"}
    made = resumed(tmp_path, begun, 5, **settings)
    group = {"weight_decay": 0.3, "betas": (0.5, 0.999), "eps": 1e-3, "fused": True, "moments": {5}}
    assert {key: made.used[6][key] for key in group} == group


@pytest.mark.parametrize("optim", ["sgd", "adamw_bnb_8bit"])
def test_another_optimizers_moments_are_refused(begun, tmp_path, optim):
    with pytest.raises(UserError, match="holds the moments of torch AdamW"):
        resumed(tmp_path, begun, 4, optim=optim)


def test_without_optimizer_state_the_schedule_goes_on_and_it_is_said(tmp_path):
    trainer(tmp_path / "small", save_only_model=True, max_steps=3, prompts_per_step=3).train()
    assert not (tmp_path / "small" / "checkpoint-3" / "optimizer.pt").exists()
    made = resumed(tmp_path, tmp_path / "small", 3, max_steps=6, prompts_per_step=3)
    assert rates(made) == pytest.approx([1e-2 * left / 6 for left in (3, 2, 1)])
    assert made.used[4]["moments"] == set() and made.sampled[4] == PROMPTS[9:]
    assert any("holds no optimizer state" in text and "step 3 of its schedule" in text for text in made.said)


@pytest.mark.parametrize(
    "settings,expected",
    [
        # Step 3 has ended with the sixth prompt: one batch of 4, and two prompts of the next that come again.
        ({"prompts_per_step": 4}, {4: PROMPTS[4:8], 5: PROMPTS[8:], 6: PROMPTS[:4]}),
        ({"prompts_per_step": 1}, {4: [PROMPTS[6]], 5: [PROMPTS[7]], 6: [PROMPTS[8]]}),
        ({"num_iterations": 2}, {4: PROMPTS[6:8], 6: PROMPTS[8:10]}),
        ({"prompts_per_step": None, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
         {4: PROMPTS[6:9], 5: PROMPTS[9:], 6: PROMPTS[:3]}),
        ({"num_generations": 2, "per_device_train_batch_size": 3},
         {4: PROMPTS[6:8], 5: PROMPTS[8:10], 6: PROMPTS[10:]}),
    ],
    ids=lambda value: "-".join(map(str, value)),
)  # fmt: skip
def test_another_batch_goes_on_where_the_data_stand(begun, tmp_path, settings, expected):
    made = resumed(tmp_path, begun, 3, **settings)
    assert made.sampled == expected and made.state.global_step == 6


def test_max_steps_are_reached_over_more_epochs_than_the_steps_alone_would_take(begun, tmp_path):
    made = resumed(tmp_path, begun, 5, prompts_per_step=1, max_steps=8)
    assert made.state.global_step == 8 and in_order(made) == [*PROMPTS[10:], PROMPTS[0]]


@pytest.mark.parametrize("prompts,steps", [(4, 5), (1, 9)])
def test_an_epoch_ends_with_its_data_whatever_the_batch(begun, tmp_path, prompts, steps):
    epoch = {"max_steps": -1, "num_train_epochs": 1.0}
    made = resumed(tmp_path, begun, 3, prompts_per_step=prompts, save_strategy="steps", save_steps=steps, **epoch)
    assert made.state.global_step == made.state.max_steps == steps
    assert in_order(made)[-6:] == PROMPTS[6:]
    # And on from there, with the batch of the beginning: the count of steps is not that of the data for good.
    again = resumed(tmp_path, tmp_path / "run", steps, **{**epoch, "num_train_epochs": 1.5})
    assert again.state.global_step == steps + 3 and in_order(again) == PROMPTS[:6]


def test_other_data_begin_at_their_first_prompt(begun, tmp_path):
    more = [*PROMPTS, "x", "y", "z"]
    made = resumed(tmp_path, begun, 3, data=more, max_steps=4)
    assert made.sampled[4] == more[:2] and any("of 12" in text and "of 15" in text for text in made.said)


def test_a_rollout_in_progress_is_kept_where_only_the_optimizer_changes(in_rollouts, tmp_path):
    made = resumed(tmp_path, in_rollouts, 3, num_iterations=2, learning_rate=1e-3, max_steps=5)
    assert made.sampled == {5: PROMPTS[4:6]}


@pytest.mark.parametrize(
    "settings",
    [{"num_generations": 2}, {"loss_type": "dr_grpo"}, {"beta": 0.0}, {"temperature": 0.5}, {"seed": 1}],
    ids=lambda value: next(iter(value)),
)
def test_a_rollout_in_progress_is_sampled_anew_where_it_was_made_otherwise(in_rollouts, tmp_path, settings):
    made = resumed(tmp_path, in_rollouts, 3, num_iterations=2, max_steps=4, **settings)
    assert made.sampled == {4: PROMPTS[2:4]}


def test_a_rollout_in_progress_is_sampled_anew_for_another_reward(in_rollouts, tmp_path):
    def constant(completions, **kwargs):
        return [float(len(c)) for c in completions]

    assert min(resumed(tmp_path, in_rollouts, 3, num_iterations=2, max_steps=4, reward=constant).sampled) == 4


def test_logging_and_saving_follow_todays_settings(begun, tmp_path):
    """transformers takes them from the checkpoint."""
    made = resumed(tmp_path, begun, 2, save_strategy="steps", save_steps=2, logging_steps=2)
    logged = [row["step"] for row in made.state.log_history if "loss" in row]
    assert logged == [1, 2, 4, 6]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_scaler_of_another_precision_is_left_behind(begun, tmp_path):
    """fp16 writes a scaler.pt; the run goes on in float32."""
    shutil.copytree(begun / "checkpoint-4", tmp_path / "checkpoint-4")
    torch.save({"scale": 65536.0, "_growth_tracker": 0}, tmp_path / "checkpoint-4" / "scaler.pt")
    assert resumed(tmp_path, tmp_path, 4).state.global_step == 6


def test_the_best_of_another_metric_is_forgotten(begun, tmp_path):
    shutil.copytree(begun / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = {**json.loads(path.read_text(encoding="utf-8")), "best_metric": 123.0, "best_global_step": 1}
    path.write_text(json.dumps(state), encoding="utf-8")
    assert resumed(tmp_path, tmp_path, 4, max_steps=5).state.best_metric == 123.0
    other = {"metric_for_best_model": "eval_reward", "max_steps": 5}
    assert resumed(tmp_path, tmp_path, 4, **other).state.best_metric is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_torn_file_is_one_sentence(begun, tmp_path, name):
    shutil.copytree(begun / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=f"checkpoint-4 .*{name}"):
        resumed(tmp_path, tmp_path, 4)


def test_the_latest_checkpoint_is_the_latest_whole_one(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])
    made = trainer(tmp_path / "run", max_steps=7)
    made.train(resume_from_checkpoint=True)
    assert min(made.used) == 6 and any("checkpoint-6 is left out: its optimizer.pt has" in text for text in made.said)
    with pytest.raises(UserError, match="no whole checkpoint"):
        trainer(tmp_path / "none").train(resume_from_checkpoint=True)


def test_a_full_disk_leaves_the_checkpoint_before(monkeypatch, tmp_path):
    made = trainer(tmp_path, max_steps=2)
    save = made._save_rng_state

    def full(folder):
        if made.state.global_step == 2:
            raise OSError(28, "No space left on device")
        save(folder)

    monkeypatch.setattr(made, "_save_rng_state", full)
    with pytest.raises(CantWrite, match=r"checkpoint-2 \(No space left"):
        made.train()
    assert not (tmp_path / "checkpoint-2").exists() and damage(tmp_path / "checkpoint-1") is None
    again = trainer(tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert set(again.used) == {2} and damage(tmp_path / "checkpoint-2") is None


def test_other_errors_while_saving_are_not_blamed_on_the_disk(monkeypatch, tmp_path):
    made = trainer(tmp_path)
    monkeypatch.setattr(made, "_save_rng_state", lambda folder: {}["oops"])
    with pytest.raises(KeyError):
        made.train()
    assert damage(tmp_path / "checkpoint-1") is not None
