"""The sweep against full logits in float64, and against what eager code in the same dtype gets wrong."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.linear_logps import linear_logps, linear_logps_ref, plan_tiles
from torch.utils.flop_counter import FlopCounterMode

from lowvram_grpo.policy.head import Head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(n, v, h, dtype=torch.float32, *, bias=False, scale=1.0, softcap=None, spread=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g).to(dtype)
    weight = (torch.randn(v, h, generator=g) * spread / h**0.5).to(dtype)
    b = torch.randn(v, generator=g).to(dtype) if bias else None
    targets = torch.randint(0, v, (n,), generator=g)
    if n > 1:
        targets[0], targets[-1] = 0, v - 1
    return hidden, Head(weight, b, scale, softcap), targets


def grads(fn, hidden, head, targets, c, dtype):
    """(logps, entropy, d hidden) of sum(c * logps), all in float64."""
    hidden = hidden.to(dtype).detach().requires_grad_()
    head = Head(
        head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), head.logit_scale, head.softcap
    )
    out = fn(hidden, head, targets)
    (out.logps * c.to(out.logps.dtype)).sum().backward()
    return out.logps.detach().double(), out.entropy.detach().double(), hidden.grad.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,v,h", [(1, 63, 17), (7, 1000, 33), (33, 50257, 24)])
@pytest.mark.parametrize("extra", [{}, {"bias": True, "scale": 0.3}, {"softcap": 5.0, "spread": 4.0}])
def test_no_worse_than_eager(dtype, n, v, h, extra):
    hidden, head, targets = problem(n, v, h, dtype, **extra)
    c = torch.randn(n, generator=torch.Generator().manual_seed(1))
    ours = lambda *a: linear_logps(*a, temperature=0.7, entropy=True, workspace_mib=1)
    eager = lambda *a: linear_logps_ref(*a, temperature=0.7)
    exact = grads(eager, hidden, head, targets, c, torch.float64)
    got = grads(ours, hidden, head, targets, c, dtype)
    plain = grads(eager, hidden, head, targets, c, dtype)
    for name, g, p, e in zip(("logps", "entropy", "d_hidden"), got, plain, exact):
        bound = 2 * (p - e).abs().max() + 2e-6 * e.abs().max() + 2e-6
        assert (g - e).abs().max() <= bound, name


def test_large_logits_stay_finite():
    hidden, head, targets = problem(5, 300, 8, spread=1.0)
    hidden = (hidden / hidden.norm(dim=1, keepdim=True) * 1e4).requires_grad_()
    out = linear_logps(hidden, head, targets, entropy=True)
    out.logps.sum().backward()
    exact = linear_logps_ref(hidden.detach().double(), Head(head.weight.double()), targets)
    assert out.logps.isfinite().all() and out.entropy.isfinite().all() and hidden.grad.isfinite().all()
    torch.testing.assert_close(out.logps.double(), exact.logps, rtol=1e-5, atol=1e-2)


def test_empty_and_non_contiguous():
    hidden, head, targets = problem(6, 63, 16)
    assert linear_logps(hidden[:0], head, targets[:0]).logps.shape == (0,)
    wide = torch.cat([hidden, hidden], 1).t().contiguous().t()
    torch.testing.assert_close(
        linear_logps(wide[:, :16], head, targets).logps, linear_logps(hidden, head, targets).logps
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_trainable_head_gets_its_gradients(bias, softcap):
    hidden, head, targets = problem(9, 257, 12, bias=bias, softcap=softcap, spread=3.0)
    c = torch.randn(9)
    leaves = [hidden, head.weight] + ([head.bias] if bias else [])
    exact = [x.double().requires_grad_() for x in leaves]
    mine = [x.clone().requires_grad_() for x in leaves]
    rebuild = lambda xs: Head(xs[1], xs[2] if bias else None, 1.5, softcap)
    (linear_logps_ref(exact[0], rebuild(exact), targets, temperature=0.6).logps * c).sum().backward()
    (linear_logps(mine[0], rebuild(mine), targets, temperature=0.6, workspace_mib=1).logps * c).sum().backward()
    for a, b in zip(mine, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_the_sweep():
    hidden, head, targets = problem(8, 500, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logps(hidden, head, targets).logps
    assert torch.equal(inside, linear_logps(hidden, head, targets).logps)


def test_flops_are_two_products_and_one_without_gradient():
    n, v, h = 64, 4096, 48
    hidden, head, targets = problem(n, v, h)
    hidden.requires_grad_()
    with FlopCounterMode(display=False) as training:
        linear_logps(hidden, head, targets).logps.sum().backward()
    with FlopCounterMode(display=False) as scoring, torch.no_grad():
        linear_logps(hidden, head, targets)
    assert training.get_total_flops() == pytest.approx(4 * n * v * h, rel=0.05)
    assert scoring.get_total_flops() == pytest.approx(2 * n * v * h, rel=0.05)


@pytest.mark.parametrize("n,v,h", [(1, 63, 8), (512, 151936, 896), (8192, 151936, 4096), (100000, 32000, 2048)])
def test_tiles_stay_inside_the_workspace(n, v, h):
    mib = 64
    rows, columns = plan_tiles(n, v, h, mib)
    assert 1 <= rows <= n and 1 <= columns <= v
    assert 4 * (rows * h + columns * h + 3 * rows * columns) <= mib * 2**20


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
        linear_logps(hidden, head, targets, workspace_mib=1).logps.sum().backward()
    assert max(sizes) <= max(v * h, 2**20 // 4) < n * v / 50


def test_bad_input_is_named():
    hidden, head, targets = problem(4, 63, 8)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        linear_logps(hidden, head, targets + 63)
    with pytest.raises(ValueError, match="temperature"):
        linear_logps(hidden, head, targets, temperature=0.0)
    with pytest.raises(ValueError, match="do not fit"):
        linear_logps(hidden[:, :5], head, targets)
