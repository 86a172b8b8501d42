"""The sweep against full logits in float64, and against what eager code in the same dtype gets wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps, linear_logps_ref
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from lowvram_grpo.kernels.sweep.plan import DirectionParams
from lowvram_grpo.kernels.transform import Transform
from problems import in_dtype, peaked, problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ["torch", "cublas", "fused"] if HAS_TRITON else ["torch"]
DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
EXTRAS = [{}, {"bias": True, "scale": 0.3}, {"softcap": 5.0, "spread": 4.0}]


def run(fn, hidden, head, targets, c, *, ref_hidden=None, e=None, dtype=None):
    """(logps, entropy, ref_logps, kl, d hidden) of sum(c * logps + e * kl) in float64, None where absent."""
    dtype = dtype or hidden.dtype
    hidden = hidden.to(DEVICE, dtype).detach().requires_grad_()
    head = in_dtype(head, dtype)
    head = Head(
        head.weight.to(DEVICE), None if head.bias is None else head.bias.to(DEVICE), *list(vars(head).values())[2:]
    )
    kwargs = {} if ref_hidden is None else {"ref_hidden": ref_hidden.to(DEVICE, dtype)}
    out = fn(hidden, head, targets.to(DEVICE), **kwargs)
    loss = (out.logps * c.to(out.logps)).sum()
    if e is not None:
        loss = loss + (out.kl * e.to(out.kl)).sum()
    loss.backward()
    parts = out.logps, out.entropy, out.ref_logps, out.kl, hidden.grad
    return [None if x is None else x.detach().double().cpu() for x in parts]


def assert_no_worse_than_eager(got, plain, exact, slack=1.0):
    for name, g, p, e in zip(("logps", "entropy", "ref_logps", "kl", "d_hidden"), got, plain, exact):
        if e is not None and e.numel():
            bound = slack * 2 * (p - e).abs().max() + 4e-6 * e.abs().max() + 4e-6
            assert (g - e).abs().max() <= bound, (name, float((g - e).abs().max()), float(bound))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,v,h", [(1, 63, 17), (7, 1000, 33)])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("reference", [False, True])
def test_dense_no_worse_than_eager(path, dtype, n, v, h, extra, reference):
    hidden, head, targets = problem(n, v, h, dtype, **extra)
    g = torch.Generator().manual_seed(1)
    c, ref, e = torch.randn(n, generator=g), None, None
    if reference:
        ref, e = hidden + 0.3 * torch.randn(n, h, generator=g).to(dtype), torch.randn(n, generator=g)
    ours = lambda *a, **k: linear_logps(
        *a, temperature=0.7, entropy=True, workspace_mib=1, path=path, direction="dense", kl=reference, **k
    )
    eager = lambda *a, **k: linear_logps_ref(*a, temperature=0.7, **k)
    exact = run(eager, hidden, head, targets, c, ref_hidden=ref, e=e, dtype=torch.float64)
    plain = run(eager, hidden, head, targets, c, ref_hidden=ref, e=e)
    got = run(ours, hidden, head, targets, c, ref_hidden=ref, e=e)
    if path == "torch" or dtype == torch.float32:
        assert_no_worse_than_eager(got, plain, exact)
    else:
        # The interpreter rounds float32 to bfloat16 towards zero: one unit in the last place of every probability.
        ulp = torch.finfo(dtype).eps
        assert_no_worse_than_eager(got[:4], plain[:4], exact[:4])
        scale = head.weight.float().norm(dim=1).max() * head.logit_scale / 0.7
        room = ulp * scale * (c.abs() + (0 if e is None else e.abs() * (1 + exact[3].abs().max())))
        assert ((got[4] - exact[4]).norm(dim=1) <= 2 * (plain[4] - exact[4]).norm(dim=1).max() + room).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=() if dtype == torch.bfloat16 else pytest.mark.full) for dtype in DTYPES]
)
def test_a_real_vocabulary(path, dtype):
    hidden, head, targets = peaked(3, 50257, 24, dtype)
    c = torch.tensor([1.0, -2.0, 0.5])
    ours = lambda *a: linear_logps(*a, temperature=0.9, entropy=True, workspace_mib=1, path=path)
    eager = lambda *a: linear_logps_ref(*a, temperature=0.9)
    exact = run(eager, hidden, head, targets, c, dtype=torch.float64)
    got, plain = run(ours, hidden, head, targets, c), run(eager, hidden, head, targets, c)
    assert_no_worse_than_eager(got[:2], plain[:2], exact[:2])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("reference", [False, True])
def test_sparse_direction_stays_within_its_bound(path, extra, reference):
    n, v, h = 9, 1100, 32
    hidden, head, targets = peaked(n, v, h, **extra)
    ref = hidden + 0.2 * torch.randn(n, h, generator=torch.Generator().manual_seed(3)) if reference else None
    one = torch.ones(n)
    params = DirectionParams("sparse", capacity=4096, max_tail=1.0)
    out = linear_logps(
        hidden.requires_grad_(), head, targets, direction=params, path=path, ref_hidden=ref, kl=reference
    )
    assert not len(out.diffuse)
    exact = run(linear_logps_ref, hidden, head, targets, one, dtype=torch.float64)[4]
    (d,) = torch.autograd.grad(out.logps.sum(), hidden, retain_graph=True)
    wrong = (d.double() - exact).norm(dim=1)
    assert (wrong <= out.bound.double() + 2e-6 * exact.abs().max()).all()
    assert wrong.max() > 0 and out.bound.max() < 0.2 * exact.norm(dim=1).max()
    if reference:
        zero = torch.zeros(n)
        exact = run(linear_logps_ref, hidden, head, targets, zero, ref_hidden=ref, e=one, dtype=torch.float64)[4]
        (d,) = torch.autograd.grad(out.kl.sum(), hidden)
        wrong = (d.double() - exact).norm(dim=1)
        assert (wrong <= out.kl_bound.double() + 1e-5 * exact.abs().max()).all()
        assert wrong.max() > 0 and out.kl_bound.max() < exact.norm(dim=1).max()


@pytest.mark.parametrize("path", PATHS)
def test_listed_and_diffuse_rows_mix(path):
    """Half the rows certain, a few of them not: the two directions meet in one result."""
    sure, head, t1 = peaked(20, 2500, 32, confidence=1.3)
    hidden = torch.cat([sure, 0.05 * torch.randn(7, 32, generator=torch.Generator().manual_seed(5))])
    targets = torch.cat([t1, torch.arange(7) * 300])
    c = torch.randn(27, generator=torch.Generator().manual_seed(2))
    params = DirectionParams("sparse", capacity=256)
    found = []

    def ours(*a):
        found.append(linear_logps(*a, entropy=True, direction=params, path=path))
        return found[0]

    got = run(ours, hidden, head, targets, c)
    exact = run(linear_logps_ref, hidden, head, targets, c, dtype=torch.float64)
    assert set(range(20, 27)) <= set(found[0].diffuse.tolist()) and len(found[0].diffuse) < 20
    assert_no_worse_than_eager(got[:2], exact[:2], exact[:2])
    assert (got[4] - exact[4]).norm() <= 4e-3 * exact[4].norm()


@pytest.mark.parametrize("path", PATHS)
def test_random_weights_take_the_dense_product_by_themselves(path):
    hidden, head, targets = problem(9, 6000, 16, spread=0.5)
    out = linear_logps(hidden.requires_grad_(), head, targets, path=path, direction=DirectionParams(capacity=64))
    assert len(out.diffuse) == 9


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("direction", ["sparse", "dense"])
@pytest.mark.parametrize("wanted", [[True, False] * 4, [False] * 8])
def test_rows_that_need_no_gradient_get_none(path, direction, wanted):
    """Whatever the loss says: here it asks all rows for one."""
    hidden, head, targets = peaked(8, 700, 16)
    wanted, ref = torch.tensor(wanted), hidden + 0.1
    h = hidden.clone().requires_grad_()
    out = linear_logps(h, head, targets, wanted=wanted, path=path, direction=direction, ref_hidden=ref, kl=True)
    whole = hidden.clone().requires_grad_()
    everything = linear_logps(whole, head, targets, path=path, direction=direction, ref_hidden=ref, kl=True)
    for a, b in ((out.logps, everything.logps), (out.kl, everything.kl), (out.ref_logps, everything.ref_logps)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert set(out.diffuse.tolist()) <= set(wanted.nonzero()[:, 0].tolist())
    (out.logps.sum() + out.kl.sum()).backward()
    (everything.logps.sum() + everything.kl.sum()).backward()
    assert (h.grad[~wanted] == 0).all()
    torch.testing.assert_close(h.grad[wanted], whole.grad[wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("direction", ["sparse", "dense"])
def test_no_rows_of_a_quantized_head_are_never_asked_for(kind, direction, monkeypatch):
    """bitsandbytes ends the process when its CUDA kernel is asked for an empty tensor."""
    import bitsandbytes.functional as bnb

    asked, original = [], bnb.dequantize_4bit
    monkeypatch.setattr(
        bnb, "dequantize_4bit", lambda a, *rest, **k: (asked.append(a.numel()), original(a, *rest, **k))[1]
    )
    hidden, head, targets = peaked(6, 200, 64)
    nobody = torch.zeros(6, dtype=torch.bool)
    out = linear_logps(hidden.requires_grad_(), head.quantized(kind), targets, wanted=nobody, direction=direction)
    out.logps.sum().backward()
    assert not hidden.grad.any() and 0 not in asked


def test_bounds_of_dense_rows_are_those_of_nothing_missing():
    hidden, head, targets = peaked(6, 200, 16)
    out = linear_logps(
        hidden.requires_grad_(), head, targets, direction="auto", ref_hidden=hidden.detach() + 0.1, kl=True
    )
    assert len(out.diffuse) == 6 and out.kl_bound.max() < 1e-4 and (out.kl_bound >= 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("direction", ["sparse", "dense"])
def test_a_quantized_head_equals_its_own_dequantized_weights(path, kind, direction):
    hidden, head, targets = peaked(6, 777, 128)
    small = head.quantized(kind)
    dense = Head(small.tile(0, 777, torch.empty(777, 128))[0])
    outs = []
    for which in (small, dense):
        h = hidden.clone().requires_grad_()
        out = linear_logps(h, which, targets, entropy=True, path=path, direction=direction, workspace_mib=1)
        out.logps.sum().backward()
        outs.append((out.logps, out.entropy, h.grad))
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    full = linear_logps(hidden, head, targets).logps
    error = float((outs[0][0] - full).abs().mean())
    print(f"{kind}: mean |logp - dense logp| = {error:.1e}")
    assert 0 < error < {"int8": 0.02, "nf4": 0.5}[kind]


def test_int8_takes_any_width():
    hidden, head, targets = peaked(4, 90, 70)
    small = head.quantized("int8")
    dense = Head(small.tile(0, 90, torch.empty(90, 70))[0])
    torch.testing.assert_close(linear_logps(hidden, small, targets).logps, linear_logps(hidden, dense, targets).logps)
    with pytest.raises(ValueError, match="multiple of 64"):
        head.quantized("nf4")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("direction", ["auto", "dense"])
def test_large_logits_stay_finite(path, direction):
    hidden, head, targets = problem(5, 300, 8)
    hidden = (hidden / hidden.norm(dim=1, keepdim=True) * 1e4).requires_grad_()
    out = linear_logps(hidden, head, targets, entropy=True, path=path, direction=direction)
    out.logps.sum().backward()
    exact = linear_logps_ref(hidden.detach().double(), Head(head.weight.double()), targets)
    assert out.logps.isfinite().all() and out.entropy.isfinite().all() and hidden.grad.isfinite().all()
    assert float(exact.logps.abs().max()) > 1e3
    torch.testing.assert_close(out.logps.double(), exact.logps, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("path", PATHS)
def test_a_forbidden_token_has_probability_zero(path):
    hidden, head, targets = peaked(4, 200, 16)
    bias = torch.zeros(200)
    bias[7] = -torch.inf
    targets[targets == 7] = 8
    exact = linear_logps_ref(hidden.double(), Head(head.weight.double(), bias.double()), targets)
    out = linear_logps(hidden.requires_grad_(), Head(head.weight, bias), targets, entropy=True, path=path)
    assert out.entropy.isfinite().all()
    torch.testing.assert_close(out.logps.double(), exact.logps, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        out = linear_logps(hidden, Head(head.weight, bias), torch.full_like(targets, 7), entropy=True, path=path)
    assert (out.logps == -torch.inf).all() and out.entropy.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_empty_and_non_contiguous(path):
    hidden, head, targets = problem(6, 63, 16)
    nothing = hidden[:0].clone().requires_grad_()
    out = linear_logps(nothing, head, targets[:0], path=path)
    out.logps.sum().backward()
    assert out.logps.shape == (0,) and nothing.grad.shape == (0, 16)
    wide = torch.cat([hidden, hidden], 1).t().contiguous().t()
    torch.testing.assert_close(
        linear_logps(wide[:, :16], head, targets, path=path).logps, linear_logps(hidden, head, targets, path=path).logps
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_trainable_head_gets_its_gradients(bias, softcap):
    hidden, head, targets = problem(9, 257, 12, bias=bias, softcap=softcap, spread=3.0)
    c = torch.randn(9)
    rebuild = lambda xs: Head(xs[1], xs[2] if bias else None, 1.5, softcap)
    leaves = [hidden, head.weight] + ([head.bias] if bias else [])
    for needs in itertools.product([False, True], repeat=2):
        wants = [*needs, True][: len(leaves)]
        exact = [x.double().requires_grad_(w) for x, w in zip(leaves, wants)]
        mine = [x.clone().requires_grad_(w) for x, w in zip(leaves, wants)]
        if not any(wants):
            continue
        (linear_logps_ref(exact[0], rebuild(exact), targets, temperature=0.6).logps * c).sum().backward()
        (
            linear_logps(mine[0], rebuild(mine), targets, temperature=0.6, workspace_mib=1, direction="dense").logps * c
        ).sum().backward()
        for a, b, w in zip(mine, exact, wants):
            assert (a.grad is not None) == w
            if w:
                torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_the_sweep():
    hidden, head, targets = problem(8, 500, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logps(hidden, head, targets).logps
    assert torch.equal(inside, linear_logps(hidden, head, targets).logps)


@pytest.mark.parametrize("path", PATHS[1:])
def test_a_broken_kernel_is_noticed(path, monkeypatch):
    """What the comparisons above are worth: a transform that forgets the temperature must fail them."""
    right = Transform
    hidden, head, targets = peaked(5, 200, 16)
    exact = linear_logps_ref(hidden.double(), in_dtype(head, torch.float64), targets, temperature=0.7).logps
    good = linear_logps(hidden, head, targets, temperature=0.7, path=path).logps
    monkeypatch.setattr(right, "temperature", 1.0)
    bad = linear_logps(hidden, head, targets, temperature=0.7, path=path).logps
    assert (good - exact).abs().max() < 1e-4 < (bad - exact).abs().max()


def test_bad_input_is_named():
    hidden, head, targets = problem(4, 63, 8)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        linear_logps(hidden, head, targets + 63)
    with pytest.raises(ValueError, match="temperature"):
        linear_logps(hidden, head, targets, temperature=0.0)
    with pytest.raises(ValueError, match="do not fit"):
        linear_logps(hidden[:, :5], head, targets)
    with pytest.raises(ValueError, match="ref_hidden"):
        linear_logps(hidden, head, targets, kl=True)
    with pytest.raises(ValueError, match="being trained"):
        linear_logps(hidden, Head(head.weight.clone().requires_grad_()), targets, ref_hidden=hidden)
    with pytest.raises(ValueError, match="direction"):
        linear_logps(hidden, head, targets, direction="swift")
    with pytest.raises(ValueError, match="path"):
        linear_logps(hidden, head, targets, path="swift")
