"""Sampling from weights that are streamed layer by layer: the tokens of resident ones, whatever is in the slots."""

from __future__ import annotations

import pytest
import torch
from models import build, with_lora

from lowvram_grpo.policy import window
from lowvram_grpo.policy.weight_stream import stream_of, stream_weights
from lowvram_grpo.rollout.decode import Decoder, DecodeSettings
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.rollout.schedule import Scheduler

PROMPTS = [[5, 6, 7, 8, 9, 4, 3, 11, 12], [10], [11, 12, 13], [7] * 12, [9, 8]]
DRAWN = Sampling(max_new_tokens=7, eos_ids=(1,), pad_id=0)


def model_of(count, kind="Qwen3", layers=5):
    model = with_lora(build(kind, num_hidden_layers=layers))
    if count:
        stream_weights(model, count, "cpu")
    return model


def poison(monkeypatch):
    leave = window.Window.leave

    def left(self, i, **settings):
        if self._using[i % 2] == i:
            self.slots[i % 2].data.fill_(0xFF)
            self._held[i % 2] = None
        leave(self, i, **settings)

    monkeypatch.setattr(window.Window, "leave", left)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_completions_are_those_of_resident_weights(count, settings, monkeypatch):
    sampling = Sampling(max_new_tokens=7, eos_ids=(1,), pad_id=0, **settings)
    # Fewer rows than requests, so that rows are refilled.
    expected = RolloutEngine(model_of(0), sampling, rows=4).generate(PROMPTS, 3, seed=2)
    poison(monkeypatch)
    for more in ({}, {"adapters": "off"}, {"adapters": "merged"}, {"fused_ops": "on"}):
        engine = RolloutEngine(model_of(count), sampling, rows=4, **more)
        for _ in range(2):
            found = engine.generate(PROMPTS, 3, seed=2)
            assert found.completion_ids == expected.completion_ids
            for ours, theirs in zip(found.sampling_per_token_logps, expected.sampling_per_token_logps):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_generate_of_transformers_too(monkeypatch):
    poison(monkeypatch)
    ids = torch.tensor([PROMPTS[0]])
    found = [model_of(n).generate(input_ids=ids, max_new_tokens=6, do_sample=False).tolist() for n in (0, 5)]
    assert found[0] == found[1]


@pytest.mark.parametrize("layers", [4, 5])
def test_copies_go_on_from_one_step_to_the_next(layers, monkeypatch):
    model, copied = model_of(layers, layers=layers), []
    fetch = window.Window._fetch

    def spy(self, i):
        copied.extend([i] if self._held[i % 2] != i else [])
        fetch(self, i)

    monkeypatch.setattr(window.Window, "_fetch", spy)
    RolloutEngine(model, DRAWN).generate([[5]], 2, seed=0)
    passes = [copied[i : i + layers] for i in range(0, len(copied), layers)]
    assert len(passes) > 2 and all(sorted(each) == list(range(layers)) for each in passes)
    assert all(each[:2] == [2, 3] for each in passes)


@pytest.mark.parametrize("nth", [1, 2, 4, 7, 11])
def test_a_copy_that_fails_ends_the_rollout_and_the_next_one_is_right(nth, monkeypatch):
    model = model_of(5)
    expected = RolloutEngine(model_of(0), DRAWN).generate(PROMPTS, 2, seed=1).completion_ids
    fetch, left = window.Window._fetch, [nth]

    def failing(self, i):
        if self._held[i % 2] != i:
            left[0] -= 1
            if left[0] == 0:
                self.slots[i % 2].data.fill_(0xFF)
                self._held[i % 2] = None
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        fetch(self, i)

    monkeypatch.setattr(window.Window, "_fetch", failing)
    engine = RolloutEngine(model, DRAWN)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(PROMPTS, 2, seed=1)
    assert engine.generate(PROMPTS, 2, seed=1).completion_ids == expected


def test_a_step_settles_where_it_may_be_a_graph(monkeypatch):
    """As a capture needs it: with the first two layers there and no copy under way, before and after."""
    from lowvram_grpo.rollout import decode

    model, seen = model_of(5), []
    stream = stream_of(model)
    settle = type(stream).settle
    monkeypatch.setattr(type(stream), "settle", lambda self: (settle(self), seen.append(list(self._window._held)))[0])
    monkeypatch.setattr(decode.Decoder, "captures", property(lambda self: True))
    expected = RolloutEngine(model_of(0), DRAWN).generate(PROMPTS, 2, seed=1).completion_ids
    assert RolloutEngine(model, DRAWN).generate(PROMPTS, 2, seed=1).completion_ids == expected
    assert len(seen) >= 2 * 7 and all(held == [0, 1] for held in seen)


def test_memory_that_is_not_locked_makes_no_graphs():
    for locked in (True, False):
        model = model_of(3)
        stream_of(model).locked = locked
        settings = DecodeSettings(graphs=True)
        decoder = Decoder(
            model.get_base_model(), DRAWN, Scheduler([1], 2, 2), [[5]], 2, seed=0, device=torch.device("cpu"),
            settings=settings,
        )  # fmt: skip
        assert decoder.captures == locked
