"""A reference streamed from host memory on the masked card: what of it is there, what waits for the device, and a card
that is full while it is scored."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

from lowvram_grpo.policy.reference import Reference
from lowvram_grpo.training.scoring import score
from tests.masked_cuda.device import live_bytes
from tests.masked_cuda.record import RECORD
from tests.masked_cuda.scenarios import full_in_training, trained

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 11]])


def scored(model, ids):
    ones = torch.ones(2, 2, dtype=torch.long, device="cuda")
    lengths = {"prompt_lengths": [2, 2], "completion_lengths": [2, 2]}
    with torch.no_grad():
        return score(model, ids[:, :2], ones, ids[:, 2:], ones, temperature=1.0, workspace_mib=1, **lengths).logps


@pytest.mark.parametrize("tied", [True, False])
def test_a_pass_waits_for_ids_alone_and_leaves_nothing_on_the_card(tied):
    RECORD.clear()
    model = make_model(hidden_size=64, num_hidden_layers=5, tie_word_embeddings=tied).cuda()
    ids, before = IDS.cuda(), live_bytes()
    resident = Reference(model)
    with resident.active() as plain:
        expected = scored(plain, ids)
        RECORD.clear()
        scored(plain, ids)
        usual = list(RECORD.syncs)
    del resident, plain
    one = Reference(model, offload=True)
    # Norms and tables of positions; less than a twentieth of the copy.
    assert live_bytes() - before < 0.05 * before
    home = {p.device.type for p in one.model.model.layers.parameters()}
    assert home == {"cpu"} and one.model.lm_head.weight.device.type == "cpu"
    for _ in range(2):
        with one.active() as visiting:
            RECORD.clear()
            found = scored(visiting, ids)
            waits = [event for event in RECORD.syncs if event not in usual]
        torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-5, atol=1e-5)
        # For the rows of the input, and for those of the targets.
        assert [event.what for event in waits] == ["download"] * 2, waits
        assert "streamed" in waits[0].where and "head.py:rows" in waits[1].where, waits
    uploads = [event for event in RECORD.copies if "upload" in event.what]
    assert not [event for event in uploads if not event.what.startswith("pinned")], uploads
    # Between passes, and by somebody who calls it as TRL's ref_model.
    assert live_bytes() - before < 0.05 * before + found.nbytes
    with torch.no_grad():
        logits = one.model(ids).logits
        torch.testing.assert_close(logits.cpu(), model(ids).logits.cpu(), rtol=1e-4, atol=1e-4)
    assert one.model.lm_head.weight.device.type == "cpu"


def test_a_mix_needs_a_piece_of_the_device_and_gives_the_resident_ones_bits():
    model = make_model(hidden_size=64).cuda()
    resident, one = Reference(model), Reference(model, offload=True)
    with torch.no_grad():
        for p in model.parameters():
            p *= 1.5
    for _ in range(3):
        resident.sync(0.3)
        one.sync(0.3)
    for a, b in zip(resident.model.parameters(), one.model.parameters()):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("phase,after", [("score", 20), ("forward", 60)])
def test_a_card_that_is_full_once_streams_its_reference(phase, after):
    settings = {
        "lora": False, "memory_probe": "off", "self_test": False, "signal_check": False, "optim": "adamw_torch",
    }  # fmt: skip
    plain, (before, hits) = trained(**settings), full_in_training(phase, after)
    survived = trained(**settings, before=before)
    assert len(hits) == 1
    assert [str(event.rung) for event in survived.trainer.guard.events] == ["reference_offload=true"]
    assert survived.trainer.reference.offloaded
    for name, weight in plain.weights.items():
        torch.testing.assert_close(survived.weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)
