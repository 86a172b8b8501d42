"""The guard of a training run: what an attempt that ran out of memory leaves to the next one."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lowvram_grpo.training.savers import TrainerGuard
from tests.invariants.test_out_of_memory import full


def test_an_update_that_is_done_again_begins_as_it_did(config, model):
    args, said, rows, drawn = config(per_device_train_batch_size=8), [], [], []
    guard = TrainerGuard(model, SimpleNamespace(rows=None), args, (), notice=said.append, log=rows.append)
    guard.active = True

    def gradients():
        assert all(p.grad is None for p in model.parameters())
        drawn.append(torch.rand(3))
        weight = next(model.parameters())
        weight.grad = torch.ones_like(weight)
        if guard.plan.micro_batch_size > 4:
            raise full()
        return drawn[-1].sum()

    assert guard.accumulate(gradients) == drawn[0].sum()
    assert len(drawn) == 2 and torch.equal(*drawn)
    assert guard.plan.micro_batch_size == args.per_device_train_batch_size == 4
    assert rows == [{"memory/oom_phase": "forward", "memory/rung": "per_device_train_batch_size=4"}] and len(said) == 1
