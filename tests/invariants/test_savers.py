"""What saves memory in the training step leaves its gradient alone."""

from __future__ import annotations

import copy

import pytest
from test_kernels_in_the_step import step, trainer_for

from lowvram_grpo.policy import offload, shared_prefix

SAVERS = {
    "shared prefix": {"shared_prefix": "on"},
    "tiled MLPs": {"mlp_tile": 5},
    "activation offload": {"activation_offload": True},
    "all": {"shared_prefix": "on", "mlp_tile": 5, "activation_offload": True},
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("settings", [{}, {"kl_estimator": "exact"}, {"num_iterations": 2}], ids=["k3", "exact", "mu"])
def test_a_step_has_the_same_gradient_with_and_without(saver, settings, config, dataset, tokenizer, model, monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 0)
    used = set()
    pack, attend = offload.Offload._pack, shared_prefix.PrefixLayout.attend
    monkeypatch.setattr(offload.Offload, "_pack", lambda *a: used.add("activation_offload") or pack(*a))
    monkeypatch.setattr(
        shared_prefix.PrefixLayout, "attend", lambda *a, **kw: used.add("shared_prefix") or attend(*a, **kw)
    )
    rows, found = [dataset[i] for i in (1, 3)], []
    plain = {"shared_prefix": "off", "gradient_checkpointing": True, "beta": 0.1, "per_device_train_batch_size": 3}
    for savers in ({}, SAVERS[saver]):
        used.clear()
        args = config(**{**plain, **settings, **savers})
        found.append(step(trainer_for(copy.deepcopy(model), args, dataset, tokenizer), rows)[0])
        assert used == set(savers) - {"mlp_tile"}
    without, with_it = found
    assert without.keys() == with_it.keys() and len(without) > 10
    for name, grad in without.items():
        assert (with_it[name] - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-7, name
