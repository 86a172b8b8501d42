"""What was decided about the data is said by train, its dry run and eval; and an inline chat template lasts."""

from __future__ import annotations

import json
import sys

import pytest

from lowvram_grpo.cli import app
from lowvram_grpo.recipe.resolve import resolve

# As recipes of open-r1 hold it: longer than any path may be.
INLINE = "{# " + "a long comment " * 30 + "#}{% for m in messages %}{{ m.content }} {% endfor %}\n0 "


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """(exit code, stdout, stderr) of `lowvram-grpo`, its lines joined."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lowvram-grpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        out = capsys.readouterr()
        return stop.value.code, " ".join(out.out.split()), " ".join(out.err.split())

    return run


@pytest.fixture
def sft(tmp_path):
    file = tmp_path / "sft.jsonl"
    turns = [[{"role": "user", "content": f"a b {i}"}, {"role": "assistant", "content": "x y"}] for i in range(4)]
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in turns), encoding="utf-8")
    return file


def test_a_run_its_dry_run_and_an_evaluation_say_what_they_made_of_the_data(call, job, sft, tmp_path):
    flags = [
        part for pair in {**job, "--data": sft, "--chat-template": INLINE, "--reward": "label"}.items() for part in pair
    ]
    said = "4 of 4 conversations in column 'messages' end with the assistant's turn"
    code, out, err = call("train", *flags, "--dry-run")
    assert code == 0 and f"note: {said}" in out and "as the model sees it: a b 0 0" in out, err
    assert not (tmp_path / "run").exists()
    code, out, err = call("train", *flags, "--eval-data", sft, "--plain")
    assert code == 0 and out.count(said) == 1, err
    assert resolve({}, tmp_path / "run" / "recipe.toml").chat_template == INLINE
    code, out, err = call("train", "--resume", tmp_path / "run", "--max-steps", 2, "--plain")
    assert code == 0 and "step 2/2" in out, err
    assert resolve({}, tmp_path / "run" / "recipe.toml").chat_template == INLINE
    code, out, err = call("eval", "-a", tmp_path / "run", "-d", sft, "--limit", 1, "-n", 2, "--use-cpu")
    assert (
        code == 0
        and said.replace("4 of 4", "1 of 1").replace("conversations", "conversation").replace("end ", "ends ") in err
    )
