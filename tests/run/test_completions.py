"""completions.jsonl."""

from __future__ import annotations

import pytest

from lowvram_grpo.run import jsonl
from lowvram_grpo.run.completions import CompletionsLog


def test_one_row_a_completion(tmp_path):
    log = CompletionsLog(tmp_path / "completions.jsonl")
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    log.write(4, [chat, "plain"], ["a", "b"], {"label": [5.0, None]}, [0.5, -0.5], {"parsed": [1, 2]})
    assert jsonl.read(log.path) == [
        {"step": 4, "prompt": "system: be short\nuser: hi", "completion": "a", "rewards": {"label": 5.0},
         "advantage": 0.5, "extras": {"parsed": 1}},
        {"step": 4, "prompt": "plain", "completion": "b", "rewards": {"label": None},
         "advantage": -0.5, "extras": {"parsed": 2}},
    ]  # fmt: skip


def test_columns_must_have_one_length(tmp_path):
    log = CompletionsLog(tmp_path / "completions.jsonl")
    with pytest.raises(ValueError, match="'label': 1"):
        log.write(1, ["p", "p"], ["a", "b"], {"label": [1.0]}, [0.0, 0.0], {})
    assert not log.path.exists()
