"""A reference that is streamed from host memory layer by layer: the numbers of one on the device, in two slots."""

from __future__ import annotations

import copy

import psutil
import pytest
import torch
from tiny import CONFIGS, tiny_model
from torch import nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import Rung, next_rung
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy import streamed, window
from lowvram_grpo.policy.reference import Reference
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.training.scoring import last_hidden_state, score

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 11]])


def scored(model, **settings):
    """Log-probs as the learner makes them."""
    prompt, completion = IDS[:, :2], IDS[:, 2:]
    if "group_sizes" in settings and why_not(model):
        pytest.skip(why_not(model))
    ones = torch.ones_like(prompt)
    with torch.no_grad():
        return score(model, prompt, ones, completion, ones, temperature=0.7, workspace_mib=1, **settings).logps


def change(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += (torch.randn(p.shape, generator=generator) * 0.05).to(p.dtype)


@pytest.mark.parametrize("sharing", [{}, {"group_sizes": [1, 1]}], ids=["rows", "packed"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_same_bits_as_on_the_device(architecture, sharing):
    model = tiny_model(architecture, num_hidden_layers=5 if "gemma3" not in architecture else 2)
    resident, streamed_one = Reference(model), Reference(model, offload=True)
    assert streamed_one.offloaded and not resident.offloaded and streamed_one.kind == resident.kind == "frozen copy"
    change(model)
    with resident.active() as plain, streamed_one.active() as visiting:
        for _ in range(2):  # a second pass finds the last pass's layers in the slots
            assert torch.equal(scored(visiting, **sharing), scored(plain, **sharing))
            assert torch.equal(visiting(IDS).logits, plain(IDS).logits)
        assert not torch.equal(scored(plain), scored(model))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_same_bits_under_autocast_and_in_16_bits(half):
    for stored in (torch.float32, half):
        model = tiny_model("qwen2", num_hidden_layers=3).to(stored)
        resident, streamed_one = Reference(model), Reference(model, offload=True)
        with torch.autocast("cpu", half), resident.active() as plain, streamed_one.active() as visiting:
            assert torch.equal(scored(visiting), scored(plain))


def test_going_over_in_the_middle_of_a_run_changes_nothing():
    model = tiny_model("llama", num_hidden_layers=4)
    reference = Reference(model)
    names = [(n, p.shape, p.dtype) for n, p in reference.model.named_parameters()]
    with reference.active() as plain:
        before = scored(plain)
    change(model)
    reference.offload()
    assert reference.offloaded
    assert [(n, p.shape, p.dtype) for n, p in reference.model.named_parameters()] == names
    with reference.active() as visiting:
        assert torch.equal(scored(visiting), before)
    reference.offload()  # once more is nothing
    reference.freeze()
    assert reference.offloaded  # a new copy stays where the last one was
    with reference.active() as visiting:
        assert torch.equal(scored(visiting), scored(model))


@pytest.mark.parametrize("layers", [1, 2, 3, 8])
def test_two_slots_in_turn_hold_the_layers_ahead_of_their_use(layers, monkeypatch):
    """Each layer is copied once a pass, the next one while it computes, and never over a layer that is in use."""
    model = tiny_model("qwen3", num_hidden_layers=layers)
    reference = Reference(model, offload=True)
    events = []
    fetch, enter, leave = window.Window._fetch, window.Window.enter, window.Window.leave

    def spying(name, inner):
        def spy(self, i, **settings):
            before = list(self._held)
            out = inner(self, i, **settings)
            if name != "fetch" or self._held != before:
                events.append((name, i))
            return out

        return spy

    for name, inner in (("_fetch", fetch), ("enter", enter), ("leave", leave)):
        monkeypatch.setattr(window.Window, name, spying(name.strip("_"), inner))
    with reference.active() as visiting:
        scored(visiting)
    assert [i for name, i in events if name == "fetch"] == list(range(layers))
    for i in range(layers):
        arrived, left = events.index(("fetch", i)), events.index(("leave", i))
        assert arrived < events.index(("enter", i)) < left
        if i >= 2:
            # Between the exit of the layer before last, whose slot it takes, and that of the layer before it.
            assert events.index(("enter", i - 2)) < arrived < events.index(("leave", i - 1))


def test_between_passes_all_layers_are_home_even_after_an_error():
    model = tiny_model("qwen2", num_hidden_layers=3)
    reference = Reference(model, offload=True)
    home = {n: p.data_ptr() for n, p in reference.model.named_parameters()}
    expected = scored(copy.deepcopy(model))
    broken = reference.model.model.layers[1].mlp
    broken.forward, forward = lambda hidden: 1 / 0, broken.forward
    with pytest.raises(ZeroDivisionError), reference.active() as visiting:
        scored(visiting)
    assert {n: p.data_ptr() for n, p in reference.model.named_parameters()} == home
    with pytest.raises(ZeroDivisionError):
        reference.model(IDS)
    assert {n: p.data_ptr() for n, p in reference.model.named_parameters()} == home
    broken.forward = forward
    with reference.active() as visiting:
        assert torch.equal(scored(visiting), expected)
        assert {n: p.data_ptr() for n, p in reference.model.named_parameters()} == home
    # Called by itself, as a script may call TRL's ref_model.
    assert torch.equal(reference.model(IDS).logits, model(IDS).logits)


def test_weights_that_layers_share_stay_on_the_device():
    model = tiny_model("llama", num_hidden_layers=3)
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    resident, one = Reference(model), Reference(model, offload=True)
    change(model)
    with resident.active() as plain, one.active() as visiting:
        assert torch.equal(scored(visiting), scored(plain))
    assert one.model.model.layers[2].mlp.up_proj.weight is one.model.model.layers[0].mlp.up_proj.weight
    one.sync(1.0)
    with one.active() as visiting:
        assert torch.equal(scored(visiting), scored(model))


def test_neighbours_share_a_piece_where_a_power_of_two_holds_them_better():
    model = tiny_model("qwen2", num_hidden_layers=8)
    moved = streamed.Streamed(copy.deepcopy(model), torch.device("cpu"))
    pieces = {layer.home.untyped_storage().data_ptr(): layer.home.untyped_storage().nbytes() for layer in moved._layers}
    whole = sum(1 << (size - 1).bit_length() for size in pieces.values())
    alone = sum(1 << (layer.bytes - 1).bit_length() for layer in moved._layers)
    assert moved.bytes <= whole < alone and whole < 1.15 * moved.bytes


@pytest.mark.parametrize("tied", [True, False])
def test_the_ledger_sees_two_layers_and_nothing_of_the_tables(tied):
    """On meta, where memory is planned; the same operators as on a card."""
    half = tiny_model("qwen2", num_hidden_layers=6, tie_word_embeddings=tied).to("meta")
    layer = sum(p.nbytes for p in half.model.layers[0].parameters())
    with Ledger() as ledger:
        with ledger.phase("made"), ledger.making("reference"):
            reference = Reference(half, offload=True)
        assert ledger.live <= 1024  # the norm behind the layers, and the frequencies of positions
        with ledger.phase("pass"), reference.active() as visiting, torch.no_grad():
            last_hidden_state(visiting, IDS.to("meta"), torch.ones_like(IDS, device="meta"))
    room = ledger.phases["pass"].categories["reference"]
    assert 2 * layer <= room <= 2 * layer + 2 * 4096
    assert ledger.categories.get("reference", 0) <= 1024


def test_a_host_that_has_no_room_says_so(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000}))
    card = type("P", (), {"nbytes": 10_000, "device": torch.device("cuda", 0)})
    model = nn.Module()
    model.parameters = lambda: [card]
    with pytest.raises(UserError, match="host memory"):
        streamed.copy_on_host(model)


def test_layers_that_are_not_known_as_such_are_refused_by_name():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

    reference = Reference(Own())
    with pytest.raises(UserError, match="Own has no decoder layers"):
        reference.offload()
    assert not reference.offloaded and reference.model is not None


def test_a_device_without_room_for_the_copy_streams_it(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model, said = tiny_model("qwen2"), []
    plain = scored(model)
    monkeypatch.setattr("lowvram_grpo.policy.reference.copy.deepcopy", _once(full, copy.deepcopy))
    reference = Reference(model, resort=True, tell=said.append)
    assert reference.offloaded and "reference_offload=true" in said[0]
    with reference.active() as visiting:
        assert torch.equal(scored(visiting), plain)
    monkeypatch.setattr("lowvram_grpo.policy.reference.copy.deepcopy", full)
    with pytest.raises(torch.OutOfMemoryError):
        Reference(model)


def _once(first, then):
    calls = []
    return lambda *args, **kwargs: (then if calls else (calls.append(1), first)[1])(*args, **kwargs)


def test_its_rung_comes_before_smaller_micro_batches_and_only_where_there_is_a_copy():
    settings = {
        "rollout_batch_size": 8, "per_device_train_batch_size": 8, "activation_offload": False, "mlp_tile": None,
        "workspace_mib": 64, "optimizer_offload": False, "gradient_checkpointing": True,
    }  # fmt: skip
    for phase in ("rollout", "score", "forward", "backward", "optimizer"):
        assert next_rung(phase, {**settings, "reference_offload": False}) == Rung("reference_offload", True)
        taken = next_rung(phase, {**settings, "reference_offload": True})
        assert taken == next_rung(phase, settings) and taken.key != "reference_offload"
