"""`--resume` on the command line: what it refuses before it touches the run, and that it works from any folder."""

from __future__ import annotations

import json
import shutil
import sys
from typing import NamedTuple

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import save_file
from test_errors import sentence, train
from transformers.training_args import OptimizerNames

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.errors import UserError
from lowvram_grpo.jobs import resume
from lowvram_grpo.recipe.resolve import job_types, training_types
from lowvram_grpo.run import jsonl, lock
from lowvram_grpo.run.checkpoints import damage, seal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def contents(folder):
    """Every file below `folder`, as bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["step"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def kept():
    """Where the run of the first test that wanted one was, and its files."""
    return {}


@pytest.fixture
def run(monkeypatch, capsys, job, tmp_path, kept):
    """A run that finished after two steps, with a checkpoint at each: made once, and copied."""
    folder = tmp_path / "run"
    if not kept:
        code, _, err = train(monkeypatch, capsys, job, max_steps="2", save_steps="1", lora_r="4")
        assert code == 0, err
        kept |= {"at": str(tmp_path), "files": contents(folder)}
        return folder
    for name, data in kept["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    recipe = (folder / "recipe.toml").read_text(encoding="utf-8").replace(kept["at"], str(tmp_path))
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "flag,value,old",
    [
        ("--model", "{tmp}/other", "tiny-model"),
        ("--lora-r", "8", "4"),
        ("--lora_alpha", "5", "32"),
        ("--lora-target-modules", "q_proj", "all-linear"),
        ("--quantization", "nf4", "none"),
        ("--adapter", "{tmp}/run/adapter", "none"),
    ],
)
def test_another_policy_is_refused_before_anything_is_written(monkeypatch, capsys, run, tmp_path, flag, value, old):
    make_model(hidden_size=16).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    value, before = value.format(tmp=tmp_path), contents(run)
    text = sentence(train(monkeypatch, capsys, {}, flag, value, resume=str(run), max_steps="4"))
    assert flag.replace("_", "-") in text and value in text and old in text and "new run" in text
    assert contents(run) == before


def test_what_stays_the_same_may_be_said_again(monkeypatch, capsys, run, job):
    code, out, err = train(
        monkeypatch, capsys, {}, resume=str(run), model=job["--model"], lora_r="4", max_steps="3", learning_rate="0.1"
    )
    assert code == 0 and "resuming from step 2" in out, err
    assert "learning_rate = 0.1" in (run / "recipe.toml").read_text(encoding="utf-8")


def test_a_model_that_was_moved_may_be_named_anew(monkeypatch, capsys, run, job, tmp_path):
    shutil.move(job["--model"], tmp_path / "moved")
    code, _, err = train(monkeypatch, capsys, {}, resume=str(run), model=str(tmp_path / "moved"), max_steps="3")
    assert code == 0 and steps(run) == [1, 2, 3], err


class Step(NamedTuple):
    """What an optimizer step used, read inside the process."""

    optimizer: str
    rate: float
    weight_decay: float
    prompts: int
    horizon: int


@pytest.fixture
def used(monkeypatch):
    """Step -> what it used, of every run in this test."""
    steps: dict[int, Step] = {}
    original = GRPOTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        group = optimizer.param_groups[0]
        decay, name = group["weight_decay"], type(optimizer).__name__
        steps[self.state.global_step + 1] = Step(name, group["lr"], decay, len(inputs), self.state.max_steps)
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", watched)
    return steps


def recipe(run):
    return tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))


def logged(run, name):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def test_changed_settings_are_used_written_and_logged_alike(monkeypatch, capsys, run, used):
    before = logged(run, "learning_rate")
    changed = {"max_steps": "6", "learning_rate": "1e-4", "weight_decay": "0.1", "prompts_per_step": "4"}
    code, out, err = train(monkeypatch, capsys, {}, resume=str(run), **changed)
    assert code == 0, err
    assert "changed since the run was begun: " in out and "learning_rate 2e-05 -> 0.0001" in out
    rates = {step: 1e-4 * (6 - step + 1) / 6 for step in (3, 4, 5, 6)}
    assert used == {step: Step("AdamW", pytest.approx(rate), 0.1, 4, 6) for step, rate in rates.items()}
    assert logged(run, "learning_rate") == {**before, **{step: row.rate for step, row in used.items()}}
    now = recipe(run)
    assert {key: str(now[key]) for key in changed} == {**changed, "learning_rate": "0.0001"}
    # Nothing is said the second time, and the settings stay.
    used.clear()
    code, out, err = train(monkeypatch, capsys, {}, resume=str(run), max_steps="7")
    assert code == 0 and "begun: max_steps 6 -> 7." in out, err
    assert used == {7: Step("AdamW", pytest.approx(1e-4 / 7), 0.1, 4, 7)}


def test_another_optimizer_is_refused_and_the_run_stays_resumable(monkeypatch, capsys, job, tmp_path, used):
    """The run of a GPU goes on where the preset takes another optimizer."""
    assert train(monkeypatch, capsys, job, max_steps="2", optim="adamw_bnb_8bit")[0] == 0
    run = tmp_path / "run"
    before = contents(run)
    for optim in ("adamw_torch", "lion_8bit", "paged_adamw_32bit"):
        text = sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="4", optim=optim))
        assert f"--optim can't change from adamw_bnb_8bit to {optim}" in text and "--adapter" in text
        assert contents(run) == before
    code, _, err = train(monkeypatch, capsys, {}, resume=str(run), max_steps="3", preset="cpu")
    assert code == 0 and recipe(run)["optim"] == "adamw_bnb_8bit" and used[3].optimizer == "AdamW", err
    # Another name of the same moments.
    code, _, err = train(monkeypatch, capsys, {}, resume=str(run), max_steps="4", optim="adamw_8bit")
    assert code == 0 and recipe(run)["optim"] == "adamw_8bit" and steps(run) == [1, 2, 3, 4], err


def test_a_preset_does_not_outvote_the_run(monkeypatch, capsys, run):
    """Whatever this machine would take now, and whatever is asked for: what the run has set stays, and it is said."""
    path = run / "recipe.toml"
    text = path.read_text(encoding="utf-8").replace('preset = "cpu"', 'preset = "8gb"')
    path.write_text(text.replace("adamw_torch", "adamw_torch_fused"), encoding="utf-8")
    code, out, err = train(monkeypatch, capsys, {}, resume=str(run), max_steps="3", preset="cpu")
    assert code == 0 and "--preset has no effect on a run that has begun" in out, err
    assert recipe(run)["optim"] == "adamw_torch_fused"


@pytest.mark.parametrize(
    "flags,words",
    [
        ({"cold_start": "5"}, ["--cold-start can't change", "is over"]),
        ({"cold_start_learning_rate": "1"}, ["--cold-start-learning-rate can't change"]),
        ({"output_dir": "elsewhere"}, ["--output-dir elsewhere has no effect beside --resume"]),
        (
            {"num_train_epochs": "9"},
            ["--num-train-epochs has no effect beside the run's max_steps 2", "--max-steps -1"],
        ),
        ({"gradient_accumulation_steps": "3"}, ["no effect beside the run's prompts_per_step"]),
        ({"max_steps": "1"}, ["finished (2 of 1 steps)"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_could_not_take_effect_is_refused(monkeypatch, capsys, run, flags, words):
    before = contents(run)
    text = sentence(train(monkeypatch, capsys, {}, resume=str(run), **flags))
    assert all(word in text for word in words), text
    assert contents(run) == before


def test_an_adapter_of_other_numbers_in_a_recipe_that_was_edited(monkeypatch, capsys, run):
    path = run / "recipe.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("lora_alpha = 32", "lora_alpha = 64"), encoding="utf-8")
    text = sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="4"))
    assert "lora_alpha is 64" in text and "has 32" in text


def test_a_run_that_would_have_to_go_back_is_refused(monkeypatch, capsys, run):
    shutil.rmtree(run / "adapter")
    assert "has done 2 steps" in sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="1"))


def test_a_reference_that_was_not_kept_is_not_made_up(monkeypatch, capsys, job, tmp_path):
    assert train(monkeypatch, capsys, job, beta="0")[0] == 0
    run = tmp_path / "run"
    (run / "cold_start").mkdir()
    text = sentence(train(monkeypatch, capsys, {}, resume=str(run), beta="0.1", max_steps="2"))
    assert "--beta can't become 0.1" in text and "cold start" in text
    (run / "cold_start").rmdir()  # without one the reference is the base
    code, _, err = train(monkeypatch, capsys, {}, resume=str(run), beta="0.1", max_steps="2")
    assert code == 0 and logged(run, "kl")[2] > 0, err


def test_the_rules_name_settings_that_there_are():
    names = {*training_types(), *job_types()}
    rules = {*resume.POLICY, *resume.COLD_START, *resume.IDLE, *resume.BATCH, *resume.OUTVOTED}
    assert rules | {*resume.OUTVOTED.values()} <= names
    known = {str(name.value) for name in OptimizerNames}
    assert {name for names in resume.SAME_MOMENTS for name in names} <= known


def test_nothing_is_written_before_the_first_step_has_succeeded(monkeypatch, capsys, run, tmp_path):
    rewards = tmp_path / "rewards.py"
    whole = rewards.read_text(encoding="utf-8")
    rewards.write_text("def digits(completions, **kwargs):\n    raise KeyError('oops')\n", encoding="utf-8")
    before = contents(run)
    text = sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="4", learning_rate="0.5"))
    assert "oops" in text and "2 steps are kept" in text and contents(run) == before
    # Nor where the step fails later, after its completions were there to be written.
    rewards.write_text(whole, encoding="utf-8")
    original = GRPOTrainer._gradients
    monkeypatch.setattr(GRPOTrainer, "_gradients", lambda *args: (_ for _ in ()).throw(UserError("no")))
    evaluated = {"eval_data": str(tmp_path / "data.jsonl"), "eval_on_start": "true"}
    assert "no (2 steps" in sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="4", **evaluated))
    assert contents(run) == before
    monkeypatch.setattr(GRPOTrainer, "_gradients", original)
    code, _, err = train(monkeypatch, capsys, {}, resume=str(run), max_steps="4")
    assert code == 0 and steps(run) == [1, 2, 3, 4], err
    assert [row["step"] for row in jsonl.read(run / "completions.jsonl")] == [s for s in (1, 2, 3, 4) for _ in range(8)]


def test_a_new_run_that_fails_in_its_first_step_stands_in_nobodys_way(monkeypatch, capsys, job, tmp_path):
    monkeypatch.setattr(GRPOTrainer, "_gradients", lambda *args: (_ for _ in ()).throw(UserError("no memory")))
    sentence(train(monkeypatch, capsys, job))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["recipe.toml", "run.lock"]
    monkeypatch.undo()
    assert train(monkeypatch, capsys, job)[0] == 0 and steps(tmp_path / "run") == [1]


def test_a_damaged_checkpoint_is_left_out_and_it_is_said(monkeypatch, capsys, run):
    (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    code, out, err = train(monkeypatch, capsys, {}, resume=str(run), max_steps="3")
    assert code == 0 and "checkpoint-2 is left out: its optimizer.pt has 0 of" in out, err
    assert "resuming from step 1" in out and steps(run) == [1, 2, 3]
    assert damage(run / "checkpoint-2") is None


def test_without_a_whole_checkpoint_nothing_is_begun_anew(monkeypatch, capsys, run):
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(b"damaged")
    before = contents(run)
    text = sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="4"))
    assert "No checkpoint of" in text and "checkpoint-1: its adapter_model.safetensors has 7 of" in text
    assert contents(run) == before


def test_weights_of_another_model_leave_recipe_and_logs_alone(monkeypatch, capsys, run):
    """Whole, and still not to be loaded."""
    for step in (1, 2):
        save_file({"no.such.weight": torch.ones(1)}, run / f"checkpoint-{step}" / "adapter_model.safetensors")
        (run / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"torn")
        seal(run / f"checkpoint-{step}")
    before = contents(run)
    text = sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="4", learning_rate="0.5"))
    assert "checkpoint-2" in text and contents(run) == before


def test_a_full_disk_is_one_sentence_that_says_what_is_kept(monkeypatch, capsys, run):
    before = contents(run)
    save = GRPOTrainer._save

    def full(self, folder=None, state_dict=None):
        save(self, folder, state_dict)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GRPOTrainer, "_save", full)
    text = sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="4"))
    assert (
        "checkpoint-3 (No space left on device)" in text
        and f"2 steps are kept: mend it and go on with --resume {run}" in text
    )
    shutil.rmtree(run / "checkpoint-1")
    text = sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="4", save_strategy="no"))
    assert "adapter (No space left on device)" in text
    # The adapter of before is still there, and nothing half written.
    assert contents(run)["adapter/adapter_model.safetensors"] == before["adapter/adapter_model.safetensors"]
    assert not [p.name for p in run.iterdir() if p.name.startswith(("adapter.", "checkpoint-3"))]
    monkeypatch.undo()
    assert train(monkeypatch, capsys, {}, resume=str(run), max_steps="4")[0] == 0 and steps(run) == [1, 2, 3, 4]


def test_a_run_in_use_is_refused(monkeypatch, capsys, run, job):
    """Of this process's lock another one would be told; see run/test_lock.py."""

    def taken(file, folder):
        raise UserError(f"{folder} is in use by process 7 on there.")

    before = contents(run)
    monkeypatch.setattr(lock, "_lock", taken)
    for arguments in ({}, {**job, "--output-dir": str(run.parent / "new")}):
        resumed = {} if arguments else {"resume": str(run), "max_steps": "4"}
        assert "is in use by process 7" in sentence(train(monkeypatch, capsys, arguments, **resumed))
    assert contents(run) == before
    assert sorted(p.name for p in (run.parent / "new").iterdir()) == ["run.lock"]
    code, out, _ = train(monkeypatch, capsys, {}, "--dry-run", resume=str(run), max_steps="4")
    assert code == 0 and "What would run" in out


def test_a_finished_run_is_left_alone(monkeypatch, capsys, run):
    before = contents(run)
    for extra in ([], ["--dry-run"], ["--max-steps", "1"]):
        text = sentence(train(monkeypatch, capsys, {}, *extra, resume=str(run)))
        assert f"{run} is finished (2 of " in text and "--max-steps" in text
        assert contents(run) == before
    code, _, err = train(monkeypatch, capsys, {}, resume=str(run), max_steps="4")
    assert code == 0 and steps(run) == [1, 2, 3, 4], err
    assert contents(run)["adapter/adapter_model.safetensors"] != before["adapter/adapter_model.safetensors"]


def test_a_run_of_whole_epochs_knows_its_end_too(monkeypatch, capsys, job, tmp_path):
    epochs = {"max_steps": None, "num_train_epochs": "0.5"}
    assert train(monkeypatch, capsys, job, **epochs)[0] == 0
    run = tmp_path / "run"
    assert steps(run) == [1, 2]
    before = contents(run)
    assert "(2 of 2 steps)" in sentence(train(monkeypatch, capsys, {}, resume=str(run)))
    assert contents(run) == before


def test_an_adapter_that_was_not_left_is_left_without_another_step(monkeypatch, capsys, run):
    before = contents(run)
    shutil.rmtree(run / "adapter")
    code, out, err = train(monkeypatch, capsys, {}, resume=str(run))
    assert code == 0 and "adapter: " in out, err
    after = contents(run)
    assert after["adapter/adapter_model.safetensors"] == before["adapter/adapter_model.safetensors"]
    assert after["metrics.jsonl"] == before["metrics.jsonl"]


def test_a_finished_run_without_a_checkpoint_is_not_begun_again(monkeypatch, capsys, job, tmp_path):
    assert train(monkeypatch, capsys, job, save_strategy="no")[0] == 0
    before = contents(tmp_path / "run")
    text = sentence(train(monkeypatch, capsys, {}, resume=str(tmp_path / "run"), max_steps="4"))
    assert "no checkpoint" in text and f"--adapter {tmp_path / 'run' / 'adapter'}" in text
    assert contents(tmp_path / "run") == before


def test_relative_paths_are_found_from_another_folder(monkeypatch, capsys, job, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    relative = {
        "model": "tiny-model",
        "data": "data.jsonl",
        "reward": "rewards.py:digits:0.5",
        "eval_data": "data.jsonl",
    }
    assert train(monkeypatch, capsys, job, **relative)[0] == 0
    monkeypatch.chdir(elsewhere)
    code, _, err = train(monkeypatch, capsys, {}, resume="../run", max_steps="2")
    assert code == 0 and steps(tmp_path / "run") == [1, 2], err
