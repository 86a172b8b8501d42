"""What a sweep costs: FLOP by torch's counter, bytes by the ledger, neither of them on a GPU."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps, linear_logps_ref
from lowvram_grpo.kernels.runtime import HAS_TRITON
from lowvram_grpo.kernels.sweep.plan import DirectionParams, plan_tiles
from problems import peaked, problem
from torch.utils.flop_counter import FlopCounterMode

from lowvram_grpo.memory.ledger import Ledger


def flops(hidden, head, targets, grad=True, **kwargs):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
        out = linear_logps(hidden.detach().requires_grad_(grad), head, targets, **kwargs)
        if grad:
            out.logps.sum().backward()
    n, h = hidden.shape
    return counter.get_total_flops() / (n * head.shape[0] * h), out


def test_rows_of_a_trained_model_cost_one_product():
    hidden, head, targets = peaked(64, 32768, 256)
    with torch.no_grad():
        entropy = linear_logps(hidden, head, targets, entropy=True).entropy.mean()
    assert 0.2 < entropy < 1.0  # Qwen2.5-0.5B on its own samples: 0.4 to 0.8
    sparse, out = flops(hidden, head, targets, direction="sparse")
    assert sparse == pytest.approx(2, rel=0.02) and len(out.diffuse) == 0
    assert flops(hidden, head, targets, direction="dense")[0] == pytest.approx(4, rel=0.02)
    assert flops(hidden, head, targets, grad=False)[0] == pytest.approx(2, rel=0.02)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
def test_diffuse_rows_cost_two_products_and_a_probe():
    hidden, head, targets = problem(16, 32768, 64, spread=0.3)  # in a workspace for two tiles, as 64 rows in 4 MiB
    params = DirectionParams(capacity=128)
    cost, out = flops(hidden, head, targets, direction=params, workspace_mib=1, path="cublas")
    assert len(out.diffuse) == 16
    assert 4 <= cost < 4.5


def test_sparse_direction_loses_less_than_a_quarter_of_what_bf16_logits_lose():
    hidden, head, targets = peaked(96, 50257, 256)
    head = Head(head.weight.bfloat16().float())
    hidden = hidden.bfloat16().float()
    exact_h = hidden.double().requires_grad_()
    (exact,) = torch.autograd.grad(linear_logps_ref(exact_h, Head(head.weight.double()), targets).logps.sum(), exact_h)
    w = head.weight
    p = (hidden.bfloat16() @ w.bfloat16().T).float().softmax(-1)
    rounded = w[targets] - p @ w
    out = linear_logps(hidden.requires_grad_(), head, targets, direction="sparse")
    (ours,) = torch.autograd.grad(out.logps.sum(), hidden)
    assert len(out.diffuse) < 10
    assert (ours - exact).norm() < (rounded - exact).norm() / 4
    assert ((ours - exact).norm(dim=1) <= out.bound + 1e-5 * exact.norm(dim=1).max()).all()


@pytest.mark.parametrize("vocab", [151_936, 303_872])
@pytest.mark.parametrize("mib", [64, 32])
@pytest.mark.parametrize("reference", [False, True])
def test_bytes_of_a_sweep_do_not_depend_on_the_vocabulary(vocab, mib, reference):
    """N = 8192, H = 4096, bfloat16, every row diffuse: the worst case."""
    n, h = 8192, 4096
    meta = lambda *shape, of=torch.bfloat16: torch.empty(*shape, dtype=of, device="meta")
    hidden, weight, targets = meta(n, h).requires_grad_(), meta(vocab, h), meta(n, of=torch.long)
    ref = meta(n, h) if reference else None
    with Ledger() as ledger:
        out = linear_logps(hidden, weight, targets, entropy=True, workspace_mib=mib, ref_hidden=ref)
        held = ledger.live
        forward = ledger.peak
        out.logps.sum().backward()
    directions = n * h * 4
    outputs = 16 * n * 4
    assert forward <= mib * 2**20 + directions + outputs
    assert held <= directions + outputs
    assert ledger.peak <= max(forward, held + hidden.numel() * 2 + mib * 2**20)


@pytest.mark.parametrize("path", ["torch", "cublas"] if HAS_TRITON else ["torch"])
def test_bytes_of_listed_rows(path):
    """On real tensors: lists, not directions, outlive the forward pass."""
    n, v, h = 48, 4000, 256
    hidden, head, targets = peaked(n, v, h)
    head.centre(hidden.device)
    with Ledger() as ledger:
        out = linear_logps(hidden.requires_grad_(), head, targets, path=path, workspace_mib=1, direction="sparse")
        held = ledger.live
    assert ledger.peak <= 2**20 + 40 * n
    assert len(out.diffuse) < n / 10
    if path == "torch":  # the interpreter keeps what it was given
        assert held < n * h * 4 / 2 + 40 * n


@pytest.mark.parametrize("n,v,h", [(1, 63, 8), (512, 151936, 896), (8192, 151936, 4096), (100000, 262144, 8192)])
def test_tiles_stay_inside_the_workspace_and_inside_32_bits(n, v, h):
    for mib in (1, 64, 1024):
        rows, columns = plan_tiles(n, v, h, mib)
        assert 1 <= rows <= n and 1 <= columns <= v
        assert rows * columns < 2**31
        if columns > 1:
            assert 4 * (rows * h + columns * h + 4 * rows * columns) <= mib * 2**20


def test_no_tensor_of_vocabulary_width_times_rows_is_made():
    """The largest tensor any operation of the sweep returns is a tile, whatever N x V would be."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)
            )
            return out

    n, v, h = 700, 20011, 8
    hidden, head, targets = problem(n, v, h)
    hidden.requires_grad_()
    with Watch():
        linear_logps(hidden, head, targets, workspace_mib=1, direction="dense").logps.sum().backward()
    assert max(sizes) <= max(v * h, 2**20 // 4) < n * v / 50
