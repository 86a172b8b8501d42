"""metrics.jsonl: one row a logged step, under TRL's metric names."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback

from lowvram_grpo.run import jsonl


class MetricsWriter(TrainerCallback):
    """Appends `{"step": ..., **logs}` at every log of the trainer: training, evaluation, the
    cold start (at step 0, under names that begin with `cold_start/`) and the summary at the end."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            jsonl.append(self.path, [{"step": state.global_step, **(logs or {})}])
