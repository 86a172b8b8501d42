"""JSON lines: strict JSON whatever the values, and rows torn by kill -9."""

from __future__ import annotations

import json

import pytest
import torch

from lowvram_grpo.errors import CantWrite
from lowvram_grpo.run import jsonl


def test_values_that_json_lacks(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"nan": float("nan"), "inf": [float("-inf"), 1.5], "tensor": torch.tensor([1.0, float("nan")]), "bool": True}
    jsonl.append(path, [row])
    text = path.read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=lambda name: f"bad constant {name}") == {
        "nan": None, "inf": [None, 1.5], "tensor": [1.0, None], "bool": True}  # fmt: skip


def test_any_text_survives(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "狗\r\n\u2028 next \ud800 end"
    jsonl.append(path, [{"text": text}, {"text": "second"}])
    assert [row["text"] for row in jsonl.read(path)] == [text, "second"]


def test_torn_last_row_is_left_out_and_removed(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.append(path, [{"step": 1}, {"step": 2}, {"step": 3}])
    with open(path, "ab") as file:
        file.write('{"step": 4, "text": "狗'.encode()[:-1])
    assert [row["step"] for row in jsonl.read(path)] == [1, 2, 3]
    jsonl.keep(path, lambda row: row["step"] != 2)
    jsonl.append(path, [{"step": 5}])
    assert path.read_text(encoding="utf-8").splitlines() == ['{"step": 1}', '{"step": 3}', '{"step": 5}']
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file_is_empty(tmp_path):
    assert jsonl.read(tmp_path / "none.jsonl") == []
    jsonl.keep(tmp_path / "none.jsonl", lambda row: True)
    assert not (tmp_path / "none.jsonl").exists()


def test_held_rows_wait_until_they_are_released(tmp_path):
    log = jsonl.Log(tmp_path / "rows.jsonl", held=True)
    log.append([{"a": 1}])
    log.append([{"a": 2}])
    assert not log.path.exists()
    log.release()
    log.append([{"a": 3}])
    assert jsonl.read(log.path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    log.release()
    assert len(jsonl.read(log.path)) == 3


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(CantWrite, match=r"rows\.jsonl"):
        jsonl.append(tmp_path / "none" / "rows.jsonl", [{"a": 1}])
