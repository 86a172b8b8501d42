"""Where a run keeps its files, what it refuses to overwrite, and where it resumes."""

from __future__ import annotations

import json
import re

import pytest

from lowvram_grpo.errors import CantWrite, UserError
from lowvram_grpo.recipe.resolve import Recipe
from lowvram_grpo.run import jsonl
from lowvram_grpo.run.checkpoints import CUT_OFF
from lowvram_grpo.run.directory import RunDirectory


def checkpoint(run: RunDirectory, step: int, state: str | None) -> None:
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    if state is not None:
        (folder / "trainer_state.json").write_text(state, encoding="utf-8")


def test_default_name_is_safe_and_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = RunDirectory.create(None, "Qwen/Qwen2.5: 0.5B")
    second = RunDirectory.create(None, "Qwen/Qwen2.5: 0.5B")
    assert re.fullmatch(r"Qwen-Qwen2\.5-0\.5B-\d{8}-\d{6}", first.path.name)
    assert first.path.parent.name == "runs" and first.path != second.path


def test_refuses_a_run_and_names_both_ways_out(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "x")
    run.recipe_path.write_text("", encoding="utf-8")
    jsonl.append(run.metrics_path, [{"step": 1}])
    with pytest.raises(UserError, match=r"--resume .*--output-dir"):
        RunDirectory.create(run.path, "x")


@pytest.mark.parametrize("trace", ["adapter", "cold_start", "checkpoint-3"])
def test_refuses_whatever_a_run_left(tmp_path, trace):
    (tmp_path / trace).mkdir()
    with pytest.raises(UserError, match="already holds a run"):
        RunDirectory.create(tmp_path, "x")


def test_an_attempt_that_logged_nothing_is_used_again(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "x")
    run.recipe_path.write_text("", encoding="utf-8")
    run.metrics_path.touch()
    assert RunDirectory.create(run.path, "x") == run


def test_refuses_foreign_files(tmp_path):
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(UserError, match=r"thesis\.doc.*--output-dir"):
        RunDirectory.create(tmp_path, "x")


def test_a_recipe_that_a_person_wrote_is_not_overwritten(tmp_path):
    """`train --config recipe.toml -o .`"""
    (tmp_path / "recipe.toml").write_text('model = "a"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"recipe\.toml.*--output-dir"):
        RunDirectory.create(tmp_path, "x")
    (tmp_path / "recipe.toml").write_text(Recipe(model="a").to_toml(), encoding="utf-8")  # an attempt's
    RunDirectory.create(tmp_path, "x")


def test_the_lock_of_an_attempt_is_no_stranger(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "x")
    with run.lock():
        run.write_recipe(Recipe(model="a").to_toml())
        run.check_new()
    assert RunDirectory.create(run.path, "x") == run


def test_two_that_begin_in_one_second_get_a_directory_each(tmp_path, monkeypatch):
    """Each is made before anybody else can ask whether it exists."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20261127-120000")
    made = [RunDirectory.create(None, "x").path.name for _ in range(3)]
    assert made == ["x-20261127-120000", "x-20261127-120000-2", "x-20261127-120000-3"]


def test_an_adapter_is_replaced_whole_or_not_at_all(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_adapter(lambda folder: (folder.mkdir(), (folder / "weights").write_text("1")))

    def full(folder):
        folder.mkdir()
        (folder / "weights").write_text("2")
        raise OSError(28, "No space left on device")

    with pytest.raises(CantWrite, match=r"adapter \(No space left"):
        run.write_adapter(full)
    assert (run.adapter_dir / "weights").read_text() == "1" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(KeyError):
        run.write_adapter(lambda folder: {}["oops"])
    run.write_adapter(lambda folder: (folder.mkdir(), (folder / "weights").write_text("3")))
    assert (run.adapter_dir / "weights").read_text() == "3" and len(list(tmp_path.iterdir())) == 1


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Can't write to the output directory .*--output-dir"):
        RunDirectory.create(tmp_path / "file" / "run", "x")


def test_open_needs_a_recipe(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        RunDirectory.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"no recipe\.toml"):
        RunDirectory.open(tmp_path)


def test_latest_checkpoint_is_the_highest_whole_one(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.latest_checkpoint() is None
    whole = json.dumps({"global_step": 9})
    checkpoint(run, 9, whole)
    checkpoint(run, 10, whole)
    checkpoint(run, 11, whole[:-3])
    checkpoint(run, 12, None)
    checkpoint(run, 13, whole)
    (tmp_path / "checkpoint-13" / "optimizer.pt").touch()
    (tmp_path / "checkpoint-99-copy").mkdir()
    told = []
    assert run.latest_checkpoint(lambda path, why: told.append((path.name, why))) == tmp_path / "checkpoint-10"
    assert told == [
        ("checkpoint-13", "its optimizer.pt is cut off"),
        ("checkpoint-12", CUT_OFF),
        ("checkpoint-11", CUT_OFF),
    ]


def test_truncate_after(tmp_path):
    run = RunDirectory(tmp_path)
    jsonl.append(run.metrics_path, [{"step": 0, "cold_start/step": 7}, {"step": 1}, {"step": 2}, {"step": 3}])
    jsonl.append(run.completions_path, [{"step": 2, "completion": "a"}, {"step": 3, "completion": "b"}])
    run.truncate_after(2)
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]
    assert [row["completion"] for row in jsonl.read(run.completions_path)] == ["a"]
    run.truncate_after(-1)
    assert run.metrics() == []
