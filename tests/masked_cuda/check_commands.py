"""The commands of a person on the masked card: train, resume, chat and eval, and a model that does not fit."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from lowvram_grpo.cli import app
from tests.masked_cuda.record import RECORD
from tests.masked_cuda.scenarios import HALF

DEMO = Path(app.__file__).parents[1] / "demo"
TASK = ("-m", DEMO / "model", "-d", DEMO / "prompts.jsonl", "-r", "accuracy", "--max-completion-length", 4)
TRAIN = (*TASK, "--num-generations", 2, "--prompts-per-step", 2, "--cold-start", "off", "--plain")


def call(monkeypatch, capsys, *arguments, stdin=b""):
    """(exit code, stdout, stderr)"""
    monkeypatch.setattr(sys, "argv", ["lowvram-grpo", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as stop:
        app.main()
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of a run in 4 bits, with a checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        settings = ("--max-steps", 2, "--save-steps", 2, "--quantization", "nf4", "--head-dtype", "int8")
        patch.setattr(sys, "argv", list(map(str, ("lowvram-grpo", "train", *TRAIN, "-o", folder, *settings))))
        with pytest.raises(SystemExit) as stop:
            app.main()
    assert stop.value.code == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum("loss" in row for row in rows) == 2
    return folder


def test_a_run_goes_on(monkeypatch, capsys, run):
    code, _, err = call(monkeypatch, capsys, "train", "--resume", run, "--max-steps", 3)
    assert code == 0, err


def test_chat_answers(monkeypatch, capsys, run):
    code, out, err = call(monkeypatch, capsys, "chat", "--adapter", run, "--max-new-tokens", 4, "-p", "17+25=")
    assert code == 0 and out.endswith("\n"), err
    assert RECORD.launches["graph"]


def test_eval_compares(monkeypatch, capsys, run):
    code, out, err = call(
        monkeypatch, capsys, "eval", *TASK, "--adapter", run, "--compare-base", "--limit", 3, "--json"
    )
    assert code == 0, err
    assert set(json.loads(out)["policies"]) == {"base", "adapter"}


def test_a_model_that_does_not_fit_is_told_in_a_sentence(monkeypatch, capsys, tmp_path):
    def full(name):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")

    monkeypatch.setattr(RECORD, "fault", full)
    code, _, err = call(monkeypatch, capsys, "train", *TRAIN, "-o", tmp_path / "run", "--max-steps", 1, f"--{HALF}")
    assert code and "memory" in err.lower() and "Traceback" not in err, err
