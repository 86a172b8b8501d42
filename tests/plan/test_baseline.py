"""Predicted bytes are those of baseline.json, or somebody has said why not (python -m tests.plan.baseline --write)."""

from __future__ import annotations

import pytest

from tests.plan.baseline import ROWS, TOTAL, difference, predicted, read

_SAID = "predicted bytes have changed; if that is meant: python -m tests.plan.baseline --write"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_predicted_bytes_are_the_baselines(row):
    said = difference(row, predicted(row), read().get(str(row)))
    assert not said, "\n".join([_SAID, *said])


def test_no_row_of_the_file_is_left_over():
    assert [*read()] == [*map(str, ROWS)]


def test_a_change_is_named_by_row_phase_and_category():
    before = {"rollout": {TOTAL: 1_000_000, "KV cache": 1000}, "backward": {TOTAL: 5000, "gradients": 1000}}
    now = {"rollout": {TOTAL: 1_000_020, "KV cache": 1020}, "backward": {TOTAL: 5010, "gradients": 1010, "head": 7}}
    assert difference(ROWS[0], now, before) == [
        "6gb, Qwen2.5-0.5B: rollout, KV cache: 1,020 bytes, baseline 1,000 (+2.0%)",
        "6gb, Qwen2.5-0.5B: backward, head: 7 bytes, baseline 0 (new)",
    ]
    gone = {"rollout": before["rollout"]}
    assert "backward, gradients: 0 bytes, baseline 1,000 (-100.0%)" in difference(ROWS[0], gone, before)[1]
    assert difference(ROWS[0], now, None) == ["6gb, Qwen2.5-0.5B: not in baseline.json"]
