"""The PNG of a run, and the command for it."""

from __future__ import annotations

import sys

import pytest
import typer
from typer.testing import CliRunner

from lowvram_grpo.cli.report import report
from lowvram_grpo.errors import UserError
from lowvram_grpo.run import jsonl
from lowvram_grpo.run.directory import RunDirectory
from lowvram_grpo.run.report import plot, series, smooth

COLD = [{"step": 0, "cold_start/step": 1, "cold_start/loss": 3.0},
        {"step": 0, "cold_start/step": 2, "cold_start/loss": 2.0, "cold_start/reward": 0.5}]  # fmt: skip
GRPO = [{"step": i, "reward": float(i), "rewards/label/mean": i / 2, "kl": None, "entropy": 0.5} for i in range(1, 5)]


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.recipe_path.touch()
    jsonl.append(run.metrics_path, [*COLD, *GRPO, {"step": 4, "train_runtime": 1.0}])
    return run


def test_smooth_looks_back_only():
    assert smooth([2.0, 4.0, 6.0, 0.0], 2) == [2.0, 3.0, 5.0, 3.0]


def test_series_puts_the_cold_start_before_step_one():
    assert series(COLD + GRPO, "reward") == ([0, 1, 2, 3, 4], [0.5, 1.0, 2.0, 3.0, 4.0])
    assert series(COLD[::-1], "reward") == ([0], [0.5])
    assert series(GRPO, "kl") == ([], [])


BEST = [{"step": i, "eval_easy_reward": 1.0, "eval_hard_reward": 0.5} for i in (2, 4)] + [
    {"step": 4, "best/step": 2, "best/metric": "eval_hard_reward", "best/value": 0.5, "best/stopped_early": False}
]


@pytest.mark.parametrize("rows", [GRPO[:1], COLD + GRPO + BEST])
def test_plot_writes_a_png(run, rows):
    run.metrics_path.unlink()
    jsonl.append(run.metrics_path, rows)
    written = plot(run.path)
    assert written == run.path / "report.png"
    assert written.read_bytes().startswith(b"\x89PNG") and written.stat().st_size > 20_000


def test_without_rewards(run):
    run.truncate_after(0)
    with pytest.raises(UserError, match="no rewards yet"):
        plot(run.path)


def test_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "lowvram-grpo\[plots\]"'):
        plot(run.path)


def test_unwritable_output(run):
    with pytest.raises(UserError, match="--output"):
        plot(run.path, run.recipe_path / "report.png")


def test_command(run, tmp_path):
    app = typer.Typer()
    app.command()(report)
    out = tmp_path / "new" / "curves.png"
    result = CliRunner().invoke(app, [str(run.path), "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert result.output.replace("\n", "") == str(out) and out.is_file()
