"""Decode steps on the masked card: what a replayed graph draws, and what waits for the device."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

from lowvram_grpo.policy.embeddings import place_embeddings
from lowvram_grpo.rollout.decode import Decoder
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.graphs import StepGraphs, bucket
from lowvram_grpo.rollout.sampler import Sampling
from tests.masked_cuda.card import CUDAGraph
from tests.masked_cuda.record import RECORD, CudaError

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [4] * 11]


def engine(model, rows=None, **more):
    # Three tokens of 41 end a completion, so that rows die out one after another.
    return RolloutEngine(model, Sampling(12, (1, 2, 3), 0, **more.pop("sampling", {})), rows, **more)


@pytest.fixture
def replayed(monkeypatch):
    """The widths of the steps that were replayed."""
    seen, call, replay = [], StepGraphs.__call__, CUDAGraph.replay
    width = []

    def step(self, rows):
        width.append(rows)
        call(self, rows)

    monkeypatch.setattr(StepGraphs, "__call__", step)
    monkeypatch.setattr(CUDAGraph, "replay", lambda self: seen.append(width[-1]) or replay(self))
    return seen


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_a_replayed_graph_draws_the_eager_steps_tokens_at_every_width(kv, replayed):
    model = make_model(hidden_size=64).cuda()
    widths = {bucket(rows, 16) for rows in range(1, 17)}
    for rows in sorted(widths):
        group, sampling = -(-rows // 2), {"repetition_penalty": 1.1}
        found, expected = (
            engine(model, rows, kv_dtype=kv, graphs=graphs, sampling=sampling).generate(PROMPTS[:2], group, seed=rows)
            for graphs in (True, False)
        )
        assert found.completion_ids == expected.completion_ids
        for a, b in zip(found.sampling_per_token_logps, expected.sampling_per_token_logps):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert set(replayed) >= widths


def test_nothing_waits_between_two_looks(monkeypatch):
    """But for an embedding in host memory, once a step."""
    model = make_model(hidden_size=64, tie_word_embeddings=False).requires_grad_(False).cuda()
    step, waits = Decoder.step, []

    def counted(self):
        before = len(RECORD.syncs)
        step(self)
        waits.append([event for event in RECORD.syncs[before:] if event.what != "capture_begin"])

    monkeypatch.setattr(Decoder, "step", counted)
    engine(model).generate(PROMPTS, 4, seed=0)
    assert len(waits) > 8 and not any(waits), waits
    place_embeddings(model, head_dtype="dense", embedding_offload=True, device=torch.device("cuda", 0))
    waits.clear()
    engine(model).generate(PROMPTS, 4, seed=0)
    assert len(waits) > 8 and max(map(len, waits)) == 1, waits


def test_what_is_put_behind_rows_waits_for_nothing(monkeypatch):
    model = make_model(hidden_size=64).cuda()
    insert, waits = Decoder.insert, []

    def counted(self, behind):
        before = len(RECORD.syncs)
        insert(self, behind)
        waits.append(RECORD.syncs[before:])

    reply = lambda turns: [[5, 6, 7] if len(turn.ids) < 6 else None for turn in turns]
    monkeypatch.setattr(Decoder, "insert", counted)
    engine(model, 5, sampling={"repetition_penalty": 1.1}).converse(PROMPTS, 4, seed=0, reply=reply)
    assert len(waits) > 1 and not any(waits), waits


def test_a_wait_or_a_pageable_copy_inside_a_capture_is_refused():
    """So that the tests here would see one."""
    x, host = torch.ones(3, device="cuda"), torch.ones(3)
    y = x.clone()
    for work in (lambda: x.sum().item(), lambda: y.copy_(host), lambda: y.copy_(host, non_blocking=True), x.cpu):
        with pytest.raises(CudaError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()
        torch.cuda.set_stream(torch.cuda.default_stream())
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        y.copy_(host.pin_memory(), non_blocking=True)


def test_devices_are_not_mixed():
    """So that every other test here would see it."""
    x = torch.ones(3, device="cuda")
    for work in (lambda: x + torch.ones(3), lambda: torch.ones(3) @ x, lambda: torch.cat([x, torch.ones(1)])):
        with pytest.raises(CudaError, match="mixes"):
            work()
    assert (x * torch.tensor(2.0)).sum().item() == 6 and x[torch.tensor([0])].device.type == "cuda"
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_what_a_graph_baked_in_shows():
    """A replay runs the captured operators on the captured tensors: a Python number stays what it was."""
    x, out, steps = torch.zeros(2, device="cuda"), torch.zeros(2, device="cuda"), [1.0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(x + steps[0])
    assert out.tolist() == [0, 0]  # a capture runs nothing
    steps[0] = 5.0
    x.fill_(1.0)
    graph.replay()
    assert out.tolist() == [2, 2]
