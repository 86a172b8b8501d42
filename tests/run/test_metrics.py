"""metrics.jsonl as a trainer callback."""

from __future__ import annotations

from types import SimpleNamespace

from lowvram_grpo.run import jsonl
from lowvram_grpo.run.metrics import MetricsWriter


def test_one_row_a_log_from_the_first_process_only(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for first in (True, False):
        state = SimpleNamespace(global_step=3, is_world_process_zero=first)
        writer.on_log(None, state, None, logs={"reward": 1.5, "kl": float("nan")})
    assert jsonl.read(writer.path) == [{"step": 3, "reward": 1.5, "kl": None}]
