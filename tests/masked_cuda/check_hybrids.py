"""Layers with a state on the masked card: what replayed graphs make of their states, and what waits for the device."""

from __future__ import annotations

import pytest
import torch

from lowvram_grpo.rollout.decode import Decoder
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from tests.masked_cuda.card import CUDAGraph
from tests.masked_cuda.record import RECORD
from tests.rollout.hybrids import FEW, build_hybrid

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [4] * 11]


@pytest.mark.parametrize("kind", FEW)
def test_replayed_graphs_carry_states_on(kind, monkeypatch):
    """Rows are refilled and moved, and turns go on behind ends that the host sees late; no step waits."""
    more = {"mamba_n_heads": 8} if kind == "GraniteMoeHybrid" else {}
    model = build_hybrid(kind, hidden_size=64, head_dim=16, tie_word_embeddings=False, **more).cuda()
    step, replay, waits, replays = Decoder.step, CUDAGraph.replay, [], []

    def counted(self):
        before = len(RECORD.syncs)
        step(self)
        waits.extend(event for event in RECORD.syncs[before:] if event.what != "capture_begin")

    monkeypatch.setattr(Decoder, "step", counted)
    monkeypatch.setattr(CUDAGraph, "replay", lambda self: replays.append(1) or replay(self))
    reply = lambda turns: [[5, 6, 7] if len(turn.ids) < 8 else None for turn in turns]
    found = {}
    for graphs in (True, False):
        engine = RolloutEngine(model, Sampling(24, tuple(range(1, 20)), 0), 5, graphs=graphs)
        found[graphs] = engine.generate(PROMPTS, 3, seed=0), engine.converse(PROMPTS, 2, seed=0, reply=reply)
    for a, b in zip(found[True], found[False]):
        assert a.completion_ids == b.completion_ids
        for x, y in zip(a.sampling_per_token_logps, b.sampling_per_token_logps):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-3)
    alone = RolloutEngine(model.cpu(), Sampling(24, tuple(range(1, 20)), 0))
    expected = alone.generate(PROMPTS, 3, seed=0), alone.converse(PROMPTS, 2, seed=0, reply=reply)
    assert [x.completion_ids for x in found[True]] == [x.completion_ids for x in expected]
    assert len(replays) > 8 and not waits, waits
