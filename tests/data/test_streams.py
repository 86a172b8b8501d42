"""Prompts from streams: each row as often as it should come, and a run that is cut off after any batch goes on with the
same rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from datasets import Dataset, IterableDataset

from lowvram_grpo.data import stream_loader
from lowvram_grpo.data.mixed_stream import MixedStream
from lowvram_grpo.data.stream_loader import Place, StreamLoader
from lowvram_grpo.data.streams import looked_at


class Plain(torch.utils.data.IterableDataset):
    """One that says nothing of its place."""

    def __iter__(self):
        return iter([{"prompt": f"t{i}"} for i in range(5)])


class OneShot(torch.utils.data.IterableDataset):
    def __init__(self):
        self.rows = iter([{"prompt": f"o{i}"} for i in range(4)])

    def __iter__(self):
        return self.rows


def shards(letter="a", rows=23, shards=3):
    return Dataset.from_dict({"prompt": [f"{letter}{i}" for i in range(rows)]}).to_iterable_dataset(num_shards=shards)


def generated():
    return IterableDataset.from_generator(lambda: ({"prompt": f"g{i}"} for i in range(11)))


STREAMS = {
    "shards": shards,
    "generator": generated,
    "no-state": Plain,
    "own-buffer": lambda: shards().shuffle(seed=3, buffer_size=7),
    "turns": lambda: MixedStream([shards(), shards("b", 6, 1)]),
    "weights": lambda: MixedStream([shards(), shards("b", 6, 1), Plain()], [0.7, 0.2, 0.1], 3),
}


def run(make, start=None, *, passes=3, steps=None, tell=lambda sentence: None, shuffle=True):
    """(prompts, the place behind them, the epoch) of each step."""
    loader = StreamLoader(make(), prompts=4, repeats=2, shuffle=shuffle, seed=5, tell=tell)
    if start is not None:
        loader.go_on(start)
    found = []
    for epoch in range(start.epoch if start else 0, passes):
        loader.set_epoch(epoch)
        for rows in loader:
            place = Place(**json.loads(json.dumps(asdict(loader.place))))
            found.append((tuple(row["prompt"] for row in rows), place, loader.epoch))
            if len(found) == steps:
                return found
    return found


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(stream_loader, "BLOCK", 6)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("name", STREAMS)
def test_a_run_goes_on_with_the_same_rows_after_any_step(name, shuffle):
    whole = run(STREAMS[name], shuffle=shuffle)
    for step in range(0, len(whole), 7):
        rest = run(STREAMS[name], whole[step][1], shuffle=shuffle)
        assert [rows for rows, *_ in rest] == [rows for rows, *_ in whole[step + 1 :]], step


@pytest.mark.parametrize("name", ["weights", "turns", "shards"])
def test_a_run_that_is_cut_off_after_every_step_loses_nothing(name):
    whole, place = run(STREAMS[name], passes=2), None
    for rows, *_ in whole:
        (once, place, _), *_ = run(STREAMS[name], place, steps=1)
        assert once == rows


@pytest.mark.parametrize("name", ["shards", "generator", "turns"])
def test_a_pass_has_each_row_once_in_an_order_of_its_own(name):
    rows = [row["prompt"] for row in STREAMS[name]()]
    steps = [prompts for prompts, *_ in run(STREAMS[name])][::2]
    each = len(steps) // 3
    passes = [[prompt for batch in steps[i * each : (i + 1) * each] for prompt in batch] for i in range(3)]
    assert all(sorted(found) == sorted(rows) for found in passes)
    assert len({tuple(found) for found in [rows, *passes]}) == 4


def test_epochs_are_what_is_known():
    epochs = [epoch for *_, epoch in run(generated)]
    assert epochs[:5] == [0.0] * 5 and epochs[5] == 1.0
    assert epochs[6:12] == pytest.approx([1.0, 1 + 4 / 11, 1 + 4 / 11, 1 + 8 / 11, 1 + 8 / 11, 2.0])


def test_weights_are_the_shares_and_every_row_comes():
    stream = MixedStream([shards("a", 60, 2), shards("b", 30, 1)], [3, 1])
    rows = [row["prompt"] for row in stream]
    assert {*rows} >= {f"a{i}" for i in range(60)} | {f"b{i}" for i in range(30)}
    assert 0.65 < Counter(row[0] for row in rows)["a"] / len(rows) < 0.85
    stream.set_epoch(1)
    assert [row["prompt"] for row in stream] != rows
    assert [row["prompt"] for row in MixedStream([shards("a", 3, 1), shards("b", 2, 1).take(0)], [1, 1])] == [
        "a0",
        "a1",
        "a2",
    ]


def test_other_rows_than_before_are_said():
    said = []
    place = run(shards)[8][1]
    run(lambda: shards("z"), place, passes=1, tell=said.append)
    assert any("gives other rows than when the checkpoint was made" in sentence for sentence in said)
    said.clear()
    run(Plain, run(Plain, shuffle=False)[1][1], tell=said.append, shuffle=False)
    assert said[0] == "finding the place in the data: its first 4 rows are read and passed over."


def test_a_stream_that_is_read_once_gives_nothing_more():
    assert len(run(OneShot)) == 2


def test_a_look_takes_the_first_rows_and_leaves_the_stream_alone():
    stream = shards("a", 300, 2)
    assert len(looked_at(stream)) == 256 and next(iter(stream))["prompt"] == "a0"
    data = Dataset.from_dict({"prompt": ["a"]})
    assert looked_at(data) is data
