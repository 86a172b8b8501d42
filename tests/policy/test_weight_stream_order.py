"""What a card's streams do to streamed weights, by clocks: copies wait for a slot's last reader, readers for copies."""

from __future__ import annotations

import contextlib

import pytest
import torch
from passes import adapted, micro_batch, tiny, training_pass

from lowvram_grpo.policy import window
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.weight_stream import stream_of, stream_weights


class Clocks:
    """A compute stream and a copy stream, each of which knows how much of the other lies behind it.

    Copies come as late as events allow: until the compute stream waits for one, its slot holds NaNs.
    """

    def __init__(self):
        self.now = self.copies_know = 0
        self.pending: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        self.waits = 0

    def record_event(self):
        self.now += 1
        return ("compute", self.now)

    def wait_event(self, event):
        assert event[0] == "copy"
        self.waits += 1
        if event in self.pending:
            slot, arrived = self.pending.pop(event)
            slot.data.copy_(arrived)


class Copies:
    def __init__(self, clocks):
        self.clocks, self.recorded = clocks, 0

    def wait_event(self, event):
        assert event[0] == "compute"
        self.clocks.copies_know = max(self.clocks.copies_know, event[1])

    def record_event(self):
        self.recorded += 1
        return ("copy", self.recorded)


@pytest.fixture
def clocks(monkeypatch):
    found, read = Clocks(), {0: 0, 1: 0}
    make, fetch, leave = window.Window.__init__, window.Window._fetch, window.Window.leave

    def made(self, *args):
        make(self, *args)
        self._stream = Copies(found)

    def fetched(self, i):
        slot, before = self.slots[i % 2], self._held[i % 2]
        fetch(self, i)
        if before != i and self._stream is not None:
            assert found.copies_know > read[i % 2], f"layer {i} is copied over one that may still be read"
            found.pending[self._arrived[i % 2]] = slot, slot.clone()
            slot.data.fill_(0xFF)

    def left(self, i, **settings):
        if self._using[i % 2] == i:
            read[i % 2] = found.now  # what was given to the compute stream by now may read it
        leave(self, i, **settings)

    monkeypatch.setattr(window.Window, "__init__", made)
    monkeypatch.setattr(window.Window, "_fetch", fetched)
    monkeypatch.setattr(window.Window, "leave", left)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return found


def policy(count):
    torch.manual_seed(7)
    model = adapted(tiny("Llama", num_hidden_layers=5))
    if count:
        stream_weights(model, count, "cpu")
    checkpoint_activations(model)
    return model


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_copies_and_their_readers_are_ordered_by_events(count, clocks):
    scores, grads = training_pass(policy(0))
    model = policy(count)
    for _ in range(2):
        with torch.no_grad():
            model(input_ids=micro_batch()[0])
        found, others = training_pass(model)
        assert torch.equal(found.logps, scores.logps)
        assert all(torch.equal(others[name], grad) for name, grad in grads.items())
        stream_of(model).settle()
    assert clocks.waits >= 4 * (count - 2)
    # Settled, nothing is under way.
    assert not clocks.pending and stream_of(model)._window._arrived == [None, None]
