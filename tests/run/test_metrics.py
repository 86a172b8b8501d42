"""metrics.jsonl as a trainer callback."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lowvram_grpo.run import jsonl
from lowvram_grpo.run.metrics import MetricsWriter, ends


def test_one_row_a_log_from_the_first_process_only(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for first in (True, False):
        state = SimpleNamespace(global_step=3, is_world_process_zero=first)
        writer.on_log(None, state, None, logs={"reward": 1.5, "kl": float("nan")})
    assert jsonl.read(writer.path) == [{"step": 3, "reward": 1.5, "kl": None}]


@pytest.mark.parametrize(
    "count, expected",
    [(0, ([], [])), (1, ([], [0])), (2, ([0], [1])), (5, ([0, 1], [3, 4])), (40, ([*range(10)], [*range(30, 40)]))],
)
def test_the_ends_of_a_run_have_no_row_in_common(count, expected):
    assert ends([*range(count)]) == expected
