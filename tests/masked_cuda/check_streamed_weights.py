"""A policy's weights streamed from host memory on the masked card: steps, graphs whose copies are their own, what waits
for the device, and what of the model is there."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model

from lowvram_grpo.policy.weight_stream import stream_of, stream_weights
from lowvram_grpo.rollout.decode import Decoder
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from tests.masked_cuda.card import CUDAGraph
from tests.masked_cuda.check_trainer import assert_same_numbers
from tests.masked_cuda.device import live_bytes
from tests.masked_cuda.record import RECORD
from tests.masked_cuda.scenarios import trained

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [4] * 11]
DEEP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}


def policy(count):
    model = make_model(**DEEP)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    if count:
        stream_weights(model, count, "cuda")
    return model if count else model.cuda()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_is_that_of_resident_weights(quantization):
    settings = {
        "quantization": quantization, "gradient_checkpointing": True, "model": DEEP, "beta": 0.05, "memory_probe": "on",
    }  # fmt: skip
    found, expected = trained(weight_offload="auto", **settings), trained(**settings)
    assert_same_numbers(found, expected)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-4, atol=1e-5)
    assert {p.device.type for p in found.trainer.model.parameters()} == {"cuda"}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_replayed_graph_brings_its_own_layers(count, monkeypatch):
    replays, replay = [], CUDAGraph.replay
    monkeypatch.setattr(CUDAGraph, "replay", lambda self: replays.append(1) or replay(self))
    drawn = Sampling(12, (1, 2, 3), 0)
    expected = RolloutEngine(policy(0), drawn, 5).generate(PROMPTS, 3, seed=4)
    replays.clear()
    model = policy(count)
    window = stream_of(model)._window
    for _ in range(2):
        found = RolloutEngine(model, drawn, 5).generate(PROMPTS, 3, seed=4)
        assert found.completion_ids == expected.completion_ids
        for a, b in zip(found.sampling_per_token_logps, expected.sampling_per_token_logps):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        # Between rollouts somebody else may have been in the slots.
        for slot in window.slots:
            slot.fill_(255)
        stream_of(model).forget()
    assert len(replays) > 8


def test_no_step_waits_and_copies_are_from_locked_memory(monkeypatch):
    model, step, waits = policy(5), Decoder.step, []

    def counted(self):
        before = len(RECORD.syncs)
        step(self)
        waits.append([event for event in RECORD.syncs[before:] if event.what != "capture_begin"])

    monkeypatch.setattr(Decoder, "step", counted)
    RECORD.clear()
    RolloutEngine(model, Sampling(12, (1, 2, 3), 0)).generate(PROMPTS, 4, seed=0)
    assert len(waits) > 8 and not any(waits), waits
    ours = [event for event in RECORD.copies if "window.py" in event.where]
    assert len(ours) > 8 and all(event.what == "pinned upload, non-blocking" for event in ours), ours


def test_a_capture_that_is_broken_off_leaves_no_layer_for_another(monkeypatch):
    drawn = Sampling(12, (1, 2, 3), 0)
    expected = RolloutEngine(policy(0), drawn, 5).generate(PROMPTS, 3, seed=4).completion_ids
    model, seen = policy(5), []

    def fault(name):
        if RECORD.capturing is not None:
            seen.append(name)
            if len(seen) == 300:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")

    RECORD.fault = fault
    try:
        with pytest.raises(torch.OutOfMemoryError):
            RolloutEngine(model, drawn, 5).generate(PROMPTS, 3, seed=4)
    finally:
        RECORD.fault = None
    assert len(seen) >= 300
    assert RolloutEngine(model, drawn, 5).generate(PROMPTS, 3, seed=4).completion_ids == expected


def test_the_card_holds_two_layers_of_those_that_wait():
    gc.collect()
    before = live_bytes()
    resident = policy(0)
    whole, model = live_bytes() - before, None
    layers = sum(p.nbytes for n, p in resident.model.model.layers.named_parameters() if "lora_" not in n)
    del resident
    gc.collect()
    model = policy(5)
    assert live_bytes() - before <= whole - layers + 2 * layers / 5 + 4096
    assert stream_of(model).locked and stream_of(model).device == torch.device("cuda", 0)
