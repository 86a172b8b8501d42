"""Activations come back from host memory as they went, and are not on the device in between."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from passes import GROUPS, adapted, micro_batch, tiny, training_pass

from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy import offload
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps
from lowvram_grpo.policy.offload import Offload, offloaded_activations
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.training.scoring import score


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 0)
    monkeypatch.setattr(offload, "_STREAMS", {})


@pytest.fixture
def sent(monkeypatch) -> list[tuple]:
    """Shapes of the tensors that were sent to host memory, of all passes."""
    shapes, pack = [], Offload._pack

    def counting(self, tensor):
        packed = pack(self, tensor)
        if packed is not tensor:
            shapes.append(tuple(tensor.shape))
        return packed

    monkeypatch.setattr(Offload, "_pack", counting)
    return shapes


def assert_equal(left, right):
    (scores, gradients), (others, theirs) = left, right
    assert torch.equal(scores.logps, others.logps) and gradients.keys() == theirs.keys()
    assert all(torch.equal(gradients[name], theirs[name]) for name in gradients)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["layers kept", "layers recomputed"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["plain", "shared prefix"])
def test_it_changes_not_one_bit(groups, checkpointed, sent):
    model = adapted(tiny("Qwen3", num_hidden_layers=4))
    if checkpointed:
        checkpoint_activations(model)
        tile_mlps(model, 7)
    assert why_not(model) is None
    plain = training_pass(model, group_sizes=groups)
    for _ in range(2):  # the second time in buffers that were used before
        assert_equal(plain, training_pass(model, group_sizes=groups, offload=True))
    tokens = (1, 23, 32) if groups else (5, 12, 32)
    assert sent.count(tokens) >= 2 * 4
    if checkpointed:
        # Beside the layers' inputs only what the final norm keeps.
        assert len(sent) <= 2 * (4 + 4)


def test_nothing_that_belongs_to_the_model_is_sent(sent):
    model = adapted(tiny("Llama"))
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    training_pass(model, offload=True)
    assert sent and not {*sent} & (weights | {shape[::-1] for shape in weights})


def test_without_a_gradient_nothing_is_sent(sent):
    model = tiny("Llama")
    with torch.no_grad():
        score(model, *micro_batch(), temperature=1.0, workspace_mib=1, offload=True)
    assert not sent


def test_small_tensors_integers_and_kept_ones_stay():
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(64, 64, requires_grad=True)
    with offloaded_activations(True, [weight], min_bytes=4096) as hooks:
        loss = ((x.exp() @ weight.T)[:4].sin() + x[torch.arange(4)].exp()).sum()
    assert hooks.tensors == 2 and hooks.bytes == 2 * 64 * 64 * 4
    loss.backward()
    assert torch.isfinite(x.grad).all()


def test_a_tensor_that_is_used_elsewhere_stays_usable_and_may_change():
    x = torch.randn(30, requires_grad=True)
    with offloaded_activations(True, min_bytes=0) as hooks:
        kept = x.exp()
        loss = kept.sum()
    with torch.no_grad():
        expected = kept.clone()
        kept.zero_()  # autograd would refuse the plain tensor; ours has the values of the forward pass
    assert hooks.tensors == 1
    loss.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, expected)
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * expected)


def test_host_buffers_serve_again_and_survive_a_broken_backward_pass():
    model = adapted(tiny("Llama", num_hidden_layers=4))
    checkpoint_activations(model)
    plain = training_pass(model)
    training_pass(model, offload=True)
    stream = offload._STREAMS[torch.device("cpu")]
    first = sorted(b.data_ptr() for b in stream._free)
    assert len(first) >= 4
    training_pass(model, offload=True)
    assert sorted(b.data_ptr() for b in stream._free) == first
    layer = model.get_base_model().model.layers[1].self_attn
    hook = layer.register_full_backward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("made up")))
    with pytest.raises(MemoryError):
        training_pass(model, offload=True)
    hook.remove()
    gc.collect()
    assert len(stream._free) == len(first)
    larger = micro_batch([9, 9, 9, 3, 3])
    training_pass(model, larger, offload=True)
    assert len(stream._free) == len(first)
    assert_equal(plain, training_pass(model, offload=True))


class LateStream(offload._CopyStream):
    """Copies nothing until somebody waits for it, as a stream might; what is copied out must then still be there."""

    def __init__(self, device):
        super().__init__(device)
        self.queue, self.done, self.hosts = [], 0, set()

    def buffer(self, size):
        buffer = super().buffer(size)
        self.hosts.add(buffer.data_ptr())
        return buffer

    def copy(self, to, source):
        outward = to.data_ptr() in self.hosts
        self.queue.append((to, weakref.ref(source) if outward else lambda: source))
        return len(self.queue)

    @torch.no_grad()
    def wait(self, event):
        while self.done < (event or 0):
            to, source = self.queue[self.done]
            to.copy_(source())
            self.queue[self.done] = None
            self.done += 1


@pytest.mark.parametrize("checkpointed", [False, True], ids=["layers kept", "layers recomputed"])
def test_nobody_reads_or_frees_memory_before_its_copy_is_done(checkpointed, monkeypatch):
    model = adapted(tiny("Llama", num_hidden_layers=4))
    if checkpointed:
        checkpoint_activations(model)
    plain = training_pass(model)
    monkeypatch.setattr(offload, "_CopyStream", LateStream)
    for _ in range(2):
        assert_equal(plain, training_pass(model, offload=True))
    stream = offload._STREAMS[torch.device("cpu")]
    assert stream.done and stream.done >= len(stream.queue) - 1


def test_on_meta_the_device_holds_less_between_the_passes():
    """By layers x tokens x hidden x 4 bytes, the layers' inputs, and never much more at once."""
    held, peak = [], []
    layers, hidden = 6, 64
    with torch.device("meta"):
        model = adapted(tiny("Llama", num_hidden_layers=layers, hidden_size=hidden, head_dim=16))
    checkpoint_activations(model)
    model.train()
    batch = micro_batch([40, 40], [60, 60], [2], device="meta")
    lengths = {"prompt_lengths": [40] * 2, "completion_lengths": [60] * 2}
    for on in (False, True):
        with Ledger() as ledger:
            scores = score(model, *batch, temperature=1.0, workspace_mib=1, offload=on, **lengths)
            held.append(ledger.live)
            scores.logps.sum().backward()
            del scores
            peak.append(ledger.peak)
    tokens = 2 * 100
    assert held[0] - held[1] >= layers * tokens * hidden * 4
    assert held[0] - held[1] <= (layers + 4) * tokens * hidden * 4
    assert peak[1] < peak[0]


def test_switched_off_it_is_not_there():
    x = torch.randn(4, requires_grad=True)
    with offloaded_activations(False) as hooks:
        x.exp().sum().backward()
    assert hooks is None
