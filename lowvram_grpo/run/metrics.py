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
