"""How often the host waits for the device in a sweep: each wait is a moment in which a GPU runs out of work."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps
from lowvram_grpo.kernels.runtime import HAS_TRITON
from lowvram_grpo.kernels.sweep import lists, sweep, vocabulary_pass
from lowvram_grpo.kernels.sweep.plan import DirectionParams, TilePlan
from problems import peaked, problem
from waits import Waits

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="PyTorch's own fold, which no GPU takes, makes lists by nonzero")


def waits(hidden, head, targets, kind=None, ref=False, **settings):
    """(waits of the forward pass, of the backward pass, the outcome)."""
    head = head if isinstance(head, Head) else Head(head)
    head = head.quantized(kind) if kind else head
    head.centre(hidden.device)
    wanted = torch.rand(len(hidden), generator=torch.Generator().manual_seed(0)) > 0.3
    wanted[0] = False
    hidden = hidden.clone().requires_grad_()
    settings = {"path": "cublas", "wanted": wanted, "ref_hidden": hidden.detach() + 0.01 if ref else None, **settings}
    with Waits() as forward:
        out = linear_logps(hidden, head, targets, kl=ref, entropy=True, **settings)
    loss = (out.logps * wanted).sum() + ((out.kl * wanted).sum() if ref else 0) - (out.entropy * wanted).sum()
    with Waits() as backward:
        loss.backward()
    # Targets outside of the vocabulary are looked for on a CPU alone.
    return [x for x in forward.where if "targets.m" not in x], backward.where, out


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("kind, ref", [(None, True), ("int8", True), ("nf4", False)])
def test_listed_rows_cost_one_wait(kind, ref, bonus):
    params = DirectionParams(max_tail=3e-4)
    forward, backward, out = waits(*peaked(12, 500, 64), kind, ref, direction=params, entropy_gradient=bonus)
    assert len(forward) == 1 and backward == [], (forward, backward)
    assert 0 < len(out.diffuse) < 8  # both kinds of rows are there


@pytest.mark.parametrize("all_wanted", [True, False])
@pytest.mark.parametrize("bonus", [False, True])
def test_dense_rows_cost_one_wait_at_most(all_wanted, bonus, monkeypatch):
    given = {"entropy_gradient": bonus, **({"wanted": None} if all_wanted else {})}
    monkeypatch.setattr(vocabulary_pass, "plan_tiles", lambda *args, **kwargs: TilePlan(8, 300))
    dense, backward, out = waits(*problem(16, 500, 64, spread=0.3), direction="dense", **given)
    assert len(dense) == (0 if all_wanted else 1) and backward == [], (dense, backward)
    # Asked after the first tile, and nothing more in any of the two blocks.
    params = DirectionParams(capacity=32)
    early, backward, out = waits(*problem(16, 500, 64, spread=0.3), direction=params, **given)
    assert len(early) == 1 and len(out.diffuse) >= 8 and backward == [], (early, backward)


def test_another_block_of_rows_costs_another_wait(monkeypatch):
    monkeypatch.setattr(vocabulary_pass, "plan_tiles", lambda *args, **kwargs: TilePlan(8, 300))
    forward, backward, _ = waits(*peaked(24, 500, 64), "int8")
    assert len(forward) == 1 + 3 and backward == [], (forward, backward)


def test_what_the_first_block_showed_is_not_tried_again(monkeypatch):
    """Lists that overflow only behind the first tile: the next blocks take the dense product at once."""
    monkeypatch.setattr(vocabulary_pass, "plan_tiles", lambda *args, **kwargs: TilePlan(8, 300))
    made = []

    def entries(*args, **kwargs):
        made.append(1)
        return lists.entries_of(*args, **kwargs)

    monkeypatch.setattr(sweep, "entries_of", entries)
    hidden, head, targets = problem(16, 900, 64, spread=0.3)
    _, _, out = waits(hidden, head, targets, direction=DirectionParams(capacity=500), wanted=None)
    assert len(made) == 1 and len(out.diffuse) == 16
