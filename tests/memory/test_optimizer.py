"""Optimizer steps that are taken back, that keep their moments in host memory, and that keep them in 8 bits."""

from __future__ import annotations

import pytest
import torch

from lowvram_grpo.memory.guard import Guard
from lowvram_grpo.memory.optimizer import GuardedStep
from tests.invariants.test_out_of_memory import full


def kinds():
    import bitsandbytes as bnb

    return {"adamw_torch": torch.optim.AdamW, "adamw_8bit": bnb.optim.AdamW8bit, "sgd": torch.optim.SGD}


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


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_8bit", "sgd"])
def test_moments_in_host_memory_change_nothing(kind):
    plain, offloaded = Fit(kind), Fit(kind, offload=True)
    assert plain.run(5) == offloaded.run(5)
    assert all(torch.equal(a, b) for a, b in zip(plain.weights, offloaded.weights))


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_8bit"])
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
