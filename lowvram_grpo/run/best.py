"""Which weights a run has left, as its rows of metrics say; without what writes them, which is slow to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
