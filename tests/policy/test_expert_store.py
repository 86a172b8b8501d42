"""Experts that wait in host memory: the same bits as on the device, and no more copies than it takes."""

from __future__ import annotations

import pytest
import torch
from mixtures import CPU, loaded, mixture
from peft import LoraConfig
from torch import nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy import expert_store
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.expert_records import Layout
from lowvram_grpo.policy.expert_store import ExpertStore
from lowvram_grpo.policy.quantized_experts import quantized_experts
from lowvram_grpo.policy.weight_stream import stream_weights
from lowvram_grpo.recipe.expert_offload import settled

IDS = torch.arange(3, 30).view(3, 9)


@pytest.fixture
def folder(tmp_path):
    mixture("qwen3_moe").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def homes(model):
    return [module.home for _, module in quantized_experts(model)]


def trained(model):
    model = attach_lora(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    checkpoint_activations(model.train())
    loss = model(IDS).logits.log_softmax(-1)[..., 5].sum()
    loss.backward()
    return loss, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("waiting", ["auto", 6, 4, 1])
def test_loss_and_gradients_are_bitwise_those_of_resident_experts(folder, waiting):
    (loss, gradients), (away, others) = trained(loaded(folder)), trained(loaded(folder, expert_offload=waiting))
    assert torch.equal(loss, away)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


def store_of(places, experts=6):
    """A layer whose expert e is made of bytes e, and what its passes copied."""
    store = ExpertStore(CPU)
    layer = store.add(experts, experts - places, Layout.of([(8, 64)], (64, 8), False))
    for expert in range(experts):
        layer.record(expert).fill_(expert)

    def visit(*used):
        before = store.fetched
        for expert, record in layer.visit(used):
            assert (record == expert).all(), expert
        return (store.fetched - before) // layer.layout.bytes

    return visit


def test_what_is_there_is_not_fetched_and_the_longest_unused_makes_room():
    visit = store_of(places=3)
    assert visit(0, 1) == 2
    assert visit(1, 2) == 1
    assert visit(0, 1, 2) == 0
    assert visit(5) == 1  # in the place of 0, the first of those that were used together
    assert visit(1, 2, 5) == 0
    assert visit(0) == 1
    visit = store_of(places=3)
    assert [visit(expert) for expert in (0, 1, 2, 0, 5, 0, 1)] == [1, 1, 1, 0, 1, 0, 1]


def test_no_expert_makes_room_for_another_of_the_same_pass():
    """Or a pass over all would find nothing of what the one before it left."""
    visit = store_of(places=3)
    assert visit(*range(6)) == 6
    assert visit(*range(6)) == 3
    assert visit(*range(6)) == 3
    assert visit(4, 5) == 2
    assert visit(4, 5) == 0


def test_without_places_all_pass_through_two_slots():
    visit = store_of(places=0)
    assert visit(*range(6)) == visit(*range(6)) == 6
    assert visit() == 0
    assert visit(3) == 1


def test_a_pass_that_is_given_up_leaves_the_store_as_it_should_be():
    store = ExpertStore(CPU)
    layer = store.add(6, 4, Layout.of([(8, 64)], (64, 8), False))
    for expert in range(6):
        layer.record(expert).fill_(expert)
    next(layer.visit([0, 1, 2, 3]))
    for expert, record in layer.visit(list(range(6))):
        assert (record == expert).all()


@pytest.mark.parametrize("waiting", ["auto", 4])
@pytest.mark.parametrize("failing", [0, 3])
def test_a_copy_that_fails_is_an_error_and_not_a_wrong_number(folder, waiting, failing, monkeypatch):
    model, wanted = loaded(folder, expert_offload=waiting), loaded(folder)(IDS).logits
    done, copy = [], ExpertStore.fetch

    def fails(self, record, slot, after):
        done.append(None)
        if len(done) == failing + 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return copy(self, record, slot, after)

    monkeypatch.setattr(ExpertStore, "fetch", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        model(IDS)
    assert torch.equal(model(IDS).logits, wanted)


def test_the_device_holds_places_and_two_slots(folder):
    with Ledger(device="cpu") as ledger:
        model = loaded(folder, expert_offload=4)
    first = homes(model)[0]
    record, layers = first.layout.bytes, len(homes(model))
    assert ledger.categories["streamed weights"] == (2 * layers + 2) * record
    assert first.store.bytes == 6 * layers * record


def test_a_host_without_room_is_said_before_it_swaps(folder, monkeypatch):
    class Little:
        available = 1000

    monkeypatch.setattr(expert_store.psutil, "virtual_memory", lambda: Little)
    with pytest.raises(UserError, match=r"expert_offload keeps the experts in host memory, of which 0.0 GiB are left"):
        loaded(folder, expert_offload="auto")


def test_values_of_the_setting():
    assert [settled(v) for v in ("off", "0", "auto", "on", 3, "12")] == ["off", "off", "auto", "auto", 3, 12]
    with pytest.raises(UserError, match="expert_offload is 'half'; it must be off, auto, or a number of experts"):
        settled("half")


@pytest.mark.parametrize("waiting", ["off", 4])
def test_whole_layers_are_streamed_with_their_experts(folder, waiting):
    """weight_offload takes a layer's 4-bit experts along; those that wait by themselves stay where they are."""
    (loss, gradients), model = trained(loaded(folder)), loaded(folder, weight_offload=1, expert_offload=waiting)
    model = attach_lora(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    stream = stream_weights(model, 1, CPU)
    record = next(module for _, module in quantized_experts(model)).expert_layout.bytes
    assert (stream.bytes > 6 * record) == (waiting == "off")
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    checkpoint_activations(model.train())
    away = model(IDS).logits.log_softmax(-1)[..., 5].sum()
    away.backward()
    assert torch.equal(loss, away)
    others = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
