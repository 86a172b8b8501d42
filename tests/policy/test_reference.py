"""The reference policy: the right weights at the right time, and none of them trained."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model

from lowvram_grpo.policy.reference import Reference, adapter_is_blank

IDS = torch.tensor([[5, 6, 7, 8]])


def wrapped(seed=0):
    return get_peft_model(make_model(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def change(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator) * 0.2


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [wrapped, make_model], ids=["adapter", "all-weights"])
def test_it_stays_where_it_was_taken(make):
    model = make()
    before, names = logits(model), trainable(model)
    reference = Reference(model)
    change(model)
    after = logits(model)
    with reference.active() as frozen:
        assert torch.equal(logits(frozen), before)
    assert torch.equal(logits(model), after) and not torch.equal(before, after)
    assert trainable(model) == names


@pytest.mark.parametrize("make", [wrapped, make_model], ids=["adapter", "all-weights"])
def test_freezing_again_moves_it(make):
    model = make()
    reference = Reference(model)
    assert reference.kind == ("adapter off" if make is wrapped else "frozen copy") and not reference.moved
    change(model)
    here, names = logits(model), trainable(model)
    reference.freeze()
    assert reference.moved
    change(model, seed=2)
    with reference.active() as frozen:
        assert torch.equal(logits(frozen), here)
    assert trainable(model) == names


@pytest.mark.parametrize("make", [wrapped, make_model], ids=["adapter", "all-weights"])
def test_saved_and_restored(make, tmp_path):
    model = make()
    reference = Reference(model)
    change(model)
    reference.freeze()
    with reference.active() as frozen:
        expected = logits(frozen)
    reference.save(tmp_path)
    again = make()
    other = Reference(again)
    other.restore(tmp_path)
    with other.active() as frozen:
        assert torch.equal(logits(frozen), expected)
    assert other.moved and not any("reference" in name for name in trainable(again))


def test_sync_mixes_parameters():
    model = wrapped()
    reference = Reference(model, follows=True)
    change(model)
    policy = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    start = {n: p.detach().clone() for n, p in model.named_parameters() if ".reference." in n}
    reference.sync(0.25)
    for name, p in model.named_parameters():
        if ".reference." in name:
            mixed = 0.25 * policy[name.replace(".reference.", ".default.")] + 0.75 * start[name]
            torch.testing.assert_close(p.detach(), mixed)


def test_a_blank_adapter_is_one_that_changes_nothing():
    model = wrapped()
    assert adapter_is_blank(model, "default")
    change(model)
    assert not adapter_is_blank(model, "default")
