"""Optimizer steps that are taken back, that keep their moments in host memory, and that keep them in 8 bits."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch

from lowvram_grpo.memory import moments
from lowvram_grpo.memory.guard import Guard
from lowvram_grpo.memory.host import HostBytes
from lowvram_grpo.memory.optimizer import GuardedStep
from tests.invariants.test_out_of_memory import full


def kinds():
    import bitsandbytes as bnb
    from transformers.optimization import Adafactor

    return {
        "adamw_torch": torch.optim.AdamW, "adamw_8bit": bnb.optim.AdamW8bit, "sgd": torch.optim.SGD,
        "adafactor": partial(Adafactor, scale_parameter=False, relative_step=False),
    }  # fmt: skip


class Fit:
    """A noisy linear regression; tensors are large enough for bitsandbytes to keep their moments in 8 bits."""

    def __init__(self, kind: str, *, offload: bool = False, active: bool = False):
        torch.manual_seed(0)
        self.x, self.wanted = torch.randn(128, 96), torch.randn(96, 64)
        self.weights = [torch.nn.Parameter(torch.zeros(96, 64)), torch.nn.Parameter(torch.zeros(96, 64))]
        self.optimizer = kinds()[kind](self.weights, lr=1e-2)
        self.events = []
        settings = {
            "rollout_batch_size": 1, "per_device_train_batch_size": 1, "activation_offload": True, "mlp_tile": 8,
            "workspace_mib": 8, "optimizer_offload": offload,
        }  # fmt: skip
        self.guard = Guard(
            settings, self.take, tell=lambda sentence, event: self.events.append(event), limits="", active=active
        )
        self.step = GuardedStep(self.optimizer, self.guard, offload=offload)

    def take(self, key, value):
        self.step.offload = value

    def loss(self):
        return ((self.x @ (self.weights[0] + self.weights[1] - self.wanted)) ** 2).mean()

    def run(self, steps: int) -> float:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        return float(self.loss().detach())


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_8bit", "sgd", "adafactor"])
def test_moments_in_host_memory_change_nothing(kind):
    plain, offloaded = Fit(kind), Fit(kind, offload=True)
    assert plain.run(5) == offloaded.run(5)
    assert all(torch.equal(a, b) for a, b in zip(plain.weights, offloaded.weights))


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_8bit", "adafactor"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_step_that_failed_half_way_never_was(kind, at):
    plain, failing = Fit(kind), Fit(kind, active=True)
    inner, steps = failing.step._step, []

    def step(closure=None):
        steps.append(1)
        inner(closure)  # weights and moments have moved
        if len(steps) == at and not failing.step.offload:
            raise full()

    failing.step._step = step
    plain.run(4)
    failing.run(4)
    assert [event.phase for event in failing.events] == ["optimizer"]
    assert all(torch.equal(a, b) for a, b in zip(plain.weights, failing.weights))


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("batch", [1, 10_000, 2**24])
def test_moments_move_in_batches_of_parameters(kind, batch, monkeypatch):
    """Each batch has one home, filled in one copy a step, whichever parameters have a gradient."""
    monkeypatch.setattr(moments, "_BATCH", batch)
    plain, offloaded = Fit(kind), Fit(kind, offload=True)
    for fit in (plain, offloaded):
        fit.run(2)
        fit.weights[0].requires_grad_(False)  # has moments, but no gradient for a while
        fit.run(1)
        fit.weights[0].requires_grad_(True)
        fit.run(1)
    homes = {home.data_ptr() for home in offloaded.step._moments._homes.values()}
    assert plain.run(2) == offloaded.run(2)
    assert all(torch.equal(a, b) for a, b in zip(plain.weights, offloaded.weights))
    assert {home.data_ptr() for home in offloaded.step._moments._homes.values()} == homes
    assert len(homes) == (1 if batch == 2**24 else 2)
    state = offloaded.optimizer.state[offloaded.weights[1]]
    key = "state1" if kind == "adamw_8bit" else "exp_avg"
    assert state[key].untyped_storage().data_ptr() in homes


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_8bit"])
def test_a_checkpoint_holds_plain_moments(kind):
    plain, offloaded = Fit(kind), Fit(kind, offload=True)
    files = [io.BytesIO(), io.BytesIO()]
    for fit, file in zip((plain, offloaded), files):
        fit.run(3)
        torch.save(fit.optimizer.state_dict(), file)
        file.seek(0)
    assert len(files[1].getbuffer()) <= len(files[0].getbuffer()) + 1000
    theirs, saved = (torch.load(file, weights_only=True) for file in files)
    held = offloaded.optimizer.state_dict()
    begin = [w.detach().clone() for w in plain.weights]
    plain.run(2), offloaded.run(2)  # in its own memory, not in the checkpoint's
    assert str(held) == str(saved) == str(theirs)
    for offload in (False, True):
        again = Fit(kind, offload=offload)
        again.optimizer.load_state_dict(copy.deepcopy(saved))
        again.step.settle()
        with torch.no_grad():
            for mine, its in zip(again.weights, begin):
                mine.copy_(its)
        again.run(2)
        assert all(torch.equal(a, b) for a, b in zip(again.weights, plain.weights))


def test_settings_of_single_parameters_hold_for_offloaded_moments_too():
    """bitsandbytes knows them by the parameter's place among all: an embedding's moments stay in 32 bits."""
    import bitsandbytes as bnb

    manager = bnb.optim.GlobalOptimManager.get_instance()
    kinds_of = {}
    for offload in (False, True):
        fit = Fit("adamw_8bit", offload=offload)
        holder = torch.nn.Module()
        holder.weight = fit.weights[0]
        manager.register_module_override(holder, "weight", {"optim_bits": 32})
        try:
            fit.run(2)
        finally:
            manager.initialize()
        kinds_of[offload] = [fit.optimizer.state[w]["state1"].dtype for w in fit.weights]
    assert kinds_of[True] == kinds_of[False] == [torch.float32, torch.uint8]


def test_bitsandbytes_does_not_wait_after_each_parameter(monkeypatch):
    import bitsandbytes.optim.optimizer as theirs

    waited = []
    monkeypatch.setattr(theirs, "sync_gpu", waited.append)
    for offload in (False, True):
        fit = Fit("adamw_8bit", offload=offload)
        fit.run(2)
        assert waited == []
    fit = Fit("adamw_8bit")
    fit.optimizer.is_paged = True  # moments that the host may touch: once, at the end
    fit.run(1)
    assert waited == [*fit.weights[:1] * len(waited)] and len(waited) <= 2
    theirs.sync_gpu(1)
    assert waited[-1] == 1  # and outside of a step everything is as it was


def test_what_a_step_keeps_for_its_undoing_lies_in_one_piece(monkeypatch):
    kept = []

    def keep(self, tensors):
        kept.append(len(tensors))
        return inner(self, tensors)

    inner = HostBytes.keep
    monkeypatch.setattr(HostBytes, "keep", keep)
    fit = Fit("adamw_torch", active=True)
    fit.run(3)
    assert kept == [2, 2, 2]  # moments that lie on the host already are cloned there
    assert len({chunk.data_ptr() for chunk in fit.step._kept._chunks}) == 1
    kept.clear()
    Fit("adamw_torch", active=True, offload=True).run(2)
    assert kept == []  # there would be nothing left to try


def test_learning_rate_schedulers_still_wrap_it():
    fit = Fit("adamw_torch")
    scheduler = torch.optim.lr_scheduler.LambdaLR(fit.optimizer, lambda step: 0.5**step)
    before = fit.run(1)
    scheduler.step()
    assert fit.optimizer.param_groups[0]["lr"] == 5e-3
    assert fit.run(1) < before


def test_moments_in_8_bits_train_as_well():
    dense, small = Fit("adamw_torch"), Fit("adamw_8bit")
    begin = float(dense.loss().detach())
    assert dense.run(150) < 0.02 * begin
    assert small.run(150) == pytest.approx(dense.run(0), abs=2e-3 * begin)
    state = small.optimizer.state[small.weights[0]]
    assert state["state1"].dtype == torch.uint8
