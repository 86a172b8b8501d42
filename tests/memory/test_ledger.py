"""The ledger against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from lowvram_grpo.memory.ledger import Ledger


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_and_peak_bytes(device):
    before = torch.empty(100, device=device)
    with Ledger() as ledger:
        a = torch.empty(1000, device=device)
        b = a * 2
        assert ledger.live == 8000
        view = b[10:]
        del b
        assert ledger.live == 8000
        del view
        assert ledger.live == 4000
        before.add_(1)
        c = before.view(10, 10).T
    assert ledger.live == 4000 and ledger.peak == 8000
    del a, c
    assert ledger.live == 0


def test_what_a_backward_pass_holds_is_freed():
    x = torch.randn(50, 50, requires_grad=True)
    with Ledger() as ledger:
        y = (x.exp() * 2).sum()
        y.backward()
        del y
    assert ledger.peak >= 2 * 50 * 50 * 4
    assert ledger.live == 50 * 50 * 4  # the gradient
