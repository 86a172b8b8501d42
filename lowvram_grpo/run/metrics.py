"""metrics.jsonl: one row a logged step, under TRL's metric names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lowvram_grpo.run import jsonl

_WINDOW = 10


def ends(rows: Sequence[Any], window: int = _WINDOW) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first and the last rows of a run to compare: at most `window` of each, and none in both. A single row has
    nothing to be compared with: the first are empty then."""
    count = min(window, len(rows) // 2)
    return rows[:count], rows[len(rows) - max(count, 1) :]


def is_evaluation(name: str) -> bool:
    """Whether a metric is the mean reward of an evaluation: eval_reward, or eval_NAME_reward of one of several data
    sets."""
    return name == "eval_reward" or (name.startswith("eval_") and name.endswith("_reward") and "/" not in name)


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that says which weights a run has left, where it has left others than its last ones on purpose."""
    return next((row for row in reversed(rows) if "best/step" in row), None)


def best_sentence(row: dict[str, Any]) -> str:
    """Which weights these are, for whoever finds them."""
    how = "stopped early at" if row["best/stopped_early"] else "went on to"
    rest = "" if row["best/step"] == row["step"] else f", and the run {how} step {row['step']}"
    return f"the weights after step {row['best/step']}, whose {row['best/metric']} was {row['best/value']:.4g}{rest}."


class MetricsWriter(TrainerCallback):
    """Appends `{"step": ..., **logs}` at every log of the trainer: training, evaluation, the
    cold start (at step 0, under names that begin with `cold_start/`) and the summary at the end."""

    def __init__(self, path: str | Path, *, held: bool = False):
        self.path = Path(path)
        self.rows = jsonl.Log(self.path, held=held)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.rows.append([{"step": state.global_step, **(logs or {})}])

    def read(self) -> list[dict[str, Any]]:
        """What is in the file."""
        return jsonl.read(self.path)
