"""`--resume` on the command line: what it refuses before it touches the run, and that it works from any folder."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import make_model, make_tokenizer
from test_errors import sentence, train


def contents(folder):
    """Every file below `folder`, as bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["step"] for row in rows if "loss" in row]


@pytest.fixture
def run(monkeypatch, capsys, job, tmp_path):
    """A run that finished after two steps, with a checkpoint at each."""
    code, _, err = train(monkeypatch, capsys, job, max_steps="2", save_steps="1", lora_r="4")
    assert code == 0, err
    return tmp_path / "run"


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


def test_a_checkpoint_that_does_not_load_leaves_recipe_and_logs_alone(monkeypatch, capsys, run):
    (run / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"damaged")
    before = contents(run)
    text = sentence(train(monkeypatch, capsys, {}, resume=str(run), max_steps="4", learning_rate="0.5"))
    assert "checkpoint-2" in text and contents(run) == before


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
