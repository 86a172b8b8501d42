"""What a fold's blocks and a pass's tiles leave alone: the outcome."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps, linear_logps_ref
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from lowvram_grpo.kernels.sweep.fold import fold_torch
from lowvram_grpo.kernels.sweep.fold_triton import fold_triton
from lowvram_grpo.kernels.sweep.plan import DirectionParams
from lowvram_grpo.kernels.sweep.state import RowState
from lowvram_grpo.kernels.sweep.vocabulary_pass import VocabularyPass
from lowvram_grpo.kernels.transform import Transform

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
DEVICE = torch.device("cpu" if interpreted() else "cuda")
PLAIN = Transform(1.0, None, 1.0)


@pytest.mark.parametrize("block", [16, 64, 512])
def test_blocks_narrower_than_a_tile_give_the_same_lists_and_sums(block):
    """Rows with one entry, with some in each block, and with more than their list holds."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 203, generator=g)
    x[1, ::17] += 12
    x[2, 190:] += 14
    x[3, :40] += 20
    targets = torch.tensor([3, 17, 202, 0, 100])
    x[torch.arange(5), targets] = 15.0
    hint = x.gather(1, targets[:, None])[:, 0]
    states = [RowState.start(targets.to(DEVICE), hint.to(DEVICE), None, 24) for _ in range(2)]
    fold_torch(states[0], x.clone().to(DEVICE), None, None, 0, PLAIN, -5.0)
    fold_triton(states[1], x.to(DEVICE), None, None, 0, PLAIN, -5.0, block=block)
    torch.testing.assert_close(states[1].stats, states[0].stats, rtol=1e-5, atol=1e-5)
    assert states[1].overflowed.tolist() == states[0].overflowed.tolist() == [False, False, False, True, False]
    lse = states[0].stats[0] + states[0].stats[1].log()
    for row in (0, 1, 2, 4):
        kept = [set(s.ids[row, : s.count[row]].tolist()) for s in states]
        above = set((x[row] > lse[row].cpu() - 5.0).nonzero()[:, 0].tolist())
        assert above <= kept[0] and above <= kept[1], row
        assert states[1].ids[row, : states[1].count[row]].diff().gt(0).all()  # in the order of the vocabulary


def test_few_diffuse_rows_take_few_wide_tiles(monkeypatch):
    """Their gradient is right, and the tiles of their pass are as wide as the buffers hold of so few rows."""
    g = torch.Generator().manual_seed(1)
    vocab, width, n = 2000, 16, 40
    weight = torch.randn(vocab, width, generator=g) * 2
    hidden = torch.zeros(n, width)
    targets = torch.randint(0, vocab, (n,), generator=g)
    hidden[4:] = 3 * weight[targets[4:]]  # four rows know nothing and are diffuse
    hidden[:4] = torch.randn(4, width, generator=g) * 0.05
    folds, fold = [], VocabularyPass.fold

    def counted(self, tiles, state, h, ref_h, v0, v1, out=None):
        folds.append((len(h), v1 - v0, out is not None))
        return fold(self, tiles, state, h, ref_h, v0, v1, out)

    monkeypatch.setattr(VocabularyPass, "fold", counted)
    monkeypatch.setattr("lowvram_grpo.kernels.sweep.vocabulary_pass.plan_tiles", lambda *a, **k: _Plan(40, 128))
    h = hidden.clone().requires_grad_()
    found = linear_logps(h, Head(weight), targets, direction=DirectionParams("auto", capacity=64), path="cublas")
    found.logps.sum().backward()
    exact = hidden.double().requires_grad_()
    linear_logps_ref(exact, Head(weight.double()), targets).logps.sum().backward()
    assert found.diffuse.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(h.grad[:4].double(), exact.grad[:4], rtol=1e-4, atol=1e-5)
    dense = [(rows, columns) for rows, columns, probabilities in folds if probabilities]
    assert dense == [(4, 1280), (4, 720)], dense
    assert all(columns <= 128 for _, columns, probabilities in folds if not probabilities)


class _Plan:
    def __init__(self, rows, columns):
        self.rows, self.columns = rows, columns
