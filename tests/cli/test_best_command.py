"""`--early-stopping` on the command line: what is left and said, and a process that died on its way there."""

from __future__ import annotations

import json
import shutil

from test_errors import sentence, train

from lowvram_grpo.run.best import best_row, best_sentence


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_best_adapter_is_left_and_it_is_said(monkeypatch, capsys, job, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def falls(completions, trainer_state, **kwargs):\n"
        "    return [i % 3 / 8 - trainer_state.global_step for i, c in enumerate(completions)]\n",
        encoding="utf-8",
    )
    evaluated = {"reward": f"{tmp_path / 'rewards.py'}:falls", "eval_data": str(tmp_path / "data.jsonl"),
                 "eval_steps": "1", "early_stopping": "2", "save_total_limit": "2", "learning_rate": "0.05",
                 "max_steps": "6", "log_completions": "true", "num_completions_to_print": "3"}  # fmt: skip
    code, out, err = train(monkeypatch, capsys, job, **evaluated)
    assert code == 0, err
    run = tmp_path / "run"
    said = "the weights after step 1, whose eval_reward was"
    assert said in out and "and the run stopped early at step 3." in out
    assert out.count("sample of step 2") == 3
    kept = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert kept == (run / "checkpoint-1" / "adapter_model.safetensors").read_bytes()
    assert kept != (run / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
    assert said in (run / "adapter" / "README.md").read_text(encoding="utf-8")
    best = best_row(rows(run))
    assert (best["step"], best["best/step"], best["best/stopped_early"]) == (3, 1, True)

    text = sentence(train(monkeypatch, capsys, {}, resume=str(run)))
    assert "early_stopping 2 has ended it at step 3 of 6" in text and "--early-stopping M" in text
    # Killed after its last checkpoint: nothing is left to do but to leave the adapter, of the best step.
    shutil.rmtree(run / "adapter")
    before = [row["step"] for row in rows(run) if "loss" in row]
    code, out, err = train(monkeypatch, capsys, {}, resume=str(run))
    assert code == 0 and said in out, err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == kept
    assert [row["step"] for row in rows(run) if "loss" in row] == before
    assert best_row(rows(run)) == best
    # With more patience it goes on.
    code, out, err = train(monkeypatch, capsys, {}, resume=str(run), early_stopping="3")
    assert code == 0 and "stopping at step 4 of 6" in out, err


def test_a_sentence_for_each_way_to_end():
    row = {"step": 9, "best/step": 6, "best/metric": "eval_reward", "best/value": 0.5, "best/stopped_early": False}
    assert best_sentence(row) == "the weights after step 6, whose eval_reward was 0.5, and the run went on to step 9."
    assert best_sentence({**row, "best/step": 9}) == "the weights after step 9, whose eval_reward was 0.5."
