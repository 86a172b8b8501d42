"""The gradient of the entropy against float64, on listed rows, on diffuse ones and on both at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps, linear_logps_ref
from lowvram_grpo.kernels.runtime import HAS_TRITON
from lowvram_grpo.kernels.sweep import vocabulary_pass
from lowvram_grpo.kernels.sweep.plan import DirectionParams, TilePlan
from problems import eager_and_compiled, in_dtype, peaked, problem
from torch.utils.flop_counter import FlopCounterMode

from lowvram_grpo.memory.ledger import Ledger

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ["torch", "cublas", "fused"] if HAS_TRITON else ["torch"]
EXTRAS = [{}, {"bias": True, "scale": 0.3}, {"softcap": 5.0, "spread": 4.0}]
ENTROPY = {"entropy": True, "entropy_gradient": True}


def coefficients(n, reference, seed=1):
    """dL/dlogp, dL/dentropy, and dL/dKL with a reference, of n rows."""
    draw = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    return dict(zip(("logps", "entropy", "kl"), draw[: 2 + reference]))


def direction(fn, hidden, head, targets, asked, *, dtype=None, **kwargs):
    """(d hidden of the sum of what is `asked` for times its coefficients in float64, the outcome)."""
    dtype = dtype or hidden.dtype
    h = hidden.detach().to(dtype).requires_grad_()
    if kwargs.get("ref_hidden") is not None:
        kwargs["ref_hidden"] = kwargs["ref_hidden"].to(dtype)
    out = fn(h, in_dtype(head, dtype) if head.dense else head, targets, **kwargs)
    loss = sum((getattr(out, name) * c.to(out.logps)).sum() for name, c in asked.items())
    return torch.autograd.grad(loss, h)[0].double(), out


def exactly(*given, **kwargs):
    return direction(linear_logps_ref, *given, dtype=torch.float64, **kwargs)[0]


def rounding_room(hidden, head, targets, wanted, temperature):
    """(n,) what one unit in the last place of every product of the dense direction can come to: the interpreter rounds
    float32 to bfloat16 towards zero."""
    head = in_dtype(head, torch.float64)
    logits = hidden.double() @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.logit_scale
    logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
    logits, p = logits / temperature, (logits / temperature).softmax(-1)
    gap = logits - logits.gather(1, targets[:, None])
    size = {"logps": 1.0, "entropy": (p * gap.abs()).sum(1) + (p * gap).sum(1).abs(), "kl": 2.0}
    scale = head.weight.norm(dim=1).max() * head.logit_scale / temperature
    return torch.finfo(hidden.dtype).eps * scale * sum(c.abs() * size[name] for name, c in wanted.items())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,v,h", [(1, 63, 17), (7, 1000, 33)])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("reference", [False, True])
def test_dense_no_worse_than_eager(path, dtype, n, v, h, extra, reference):
    """With log-prob, entropy and exact KL in one loss."""
    hidden, head, targets = problem(n, v, h, dtype, **extra)
    noise = torch.randn(n, h, generator=torch.Generator().manual_seed(2)).to(dtype)
    ref = {"ref_hidden": hidden + 0.3 * noise} if reference else {}
    given = hidden, head, targets, coefficients(n, reference)
    exact = exactly(*given, temperature=0.7, **ref)
    plain, _ = direction(linear_logps_ref, *given, temperature=0.7, **ref)
    settings = {"path": path, "direction": "dense", "workspace_mib": 1, "kl": reference, **ENTROPY}
    got, out = direction(linear_logps, *given, temperature=0.7, **ref, **settings)
    assert len(out.diffuse) == n
    room = 8e-6 * exact.norm(dim=1).max() + 8e-6
    if path != "torch" and dtype != torch.float32:
        room = room + rounding_room(*given, 0.7)
    assert ((got - exact).norm(dim=1) <= 2 * (plain - exact).norm(dim=1).max() + room).all()


@pytest.mark.parametrize("path", PATHS)
def test_sums_are_rescaled_whenever_a_tile_has_a_new_maximum(path, monkeypatch):
    """Logits that grow along the vocabulary, a few tiles of it, both kinds of beginning: with and without E[l]."""
    monkeypatch.setattr(vocabulary_pass, "plan_tiles", lambda *args, **kwargs: TilePlan(8, 50))
    hidden, head, _ = problem(8, 190, 16, spread=0.5)
    head = Head(head.weight, torch.arange(190) / 30)
    given = hidden, head, torch.arange(8), coefficients(8, False)
    exact = exactly(*given)
    for params in (DirectionParams("dense"), DirectionParams("sparse", capacity=16)):
        got, out = direction(linear_logps, *given, path=path, direction=params, **ENTROPY)
        assert len(out.diffuse) == 8
        assert (got - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
@pytest.mark.parametrize("alone", [False, True])
def test_lists_and_tails_weigh_the_same_in_every_path(alone):
    """Of a head whose mean row is far from zero, so that a tail in the wrong place shows."""
    hidden, head, targets = peaked(9, 1100, 32)
    head = Head(head.weight + 0.5)
    params = DirectionParams("sparse", epsilon=2.0**-7, capacity=4096, max_tail=1.0)
    asked = {"entropy": torch.ones(9)} if alone else coefficients(9, True)
    settings = {"direction": params, "ref_hidden": hidden * 0.9, "kl": True, **ENTROPY}
    plain, *others = (direction(linear_logps, hidden, head, targets, asked, path=path, **settings) for path in PATHS)
    assert (plain[1].entropy_bound > 1e-2).any() and not len(plain[1].diffuse)
    for got, _ in others:
        torch.testing.assert_close(got, plain[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("reference", [False, True])
def test_sparse_direction_stays_within_its_bound(path, extra, reference):
    n, v, h = 9, 1100, 32
    hidden, head, targets = peaked(n, v, h, **extra)
    ref = {"ref_hidden": hidden + 0.2 * torch.randn(n, h, generator=torch.Generator().manual_seed(3))}
    ref = ref if reference else {}
    params = DirectionParams("sparse", capacity=4096, max_tail=1.0)
    settings = {"path": path, "direction": params, "kl": reference, **ENTROPY, **ref}
    alone = {"entropy": torch.ones(n)}
    got, out = direction(linear_logps, hidden, head, targets, alone, **settings)
    assert not len(out.diffuse)
    exact = exactly(hidden, head, targets, alone)
    wrong = (got - exact).norm(dim=1)
    assert (wrong <= out.entropy_bound.double() + 1e-5 * exact.abs().max()).all()
    # Without soft-capping, whose tail is put nowhere, hardly anything is missing.
    assert wrong.max() > 0 and wrong.max() < (0.2 if head.softcap else 0.05) * exact.norm(dim=1).max()
    # What the three directions lack adds up.
    wanted = coefficients(n, reference)
    together, _ = direction(linear_logps, hidden, head, targets, wanted, **settings)
    bounds = {"logps": out.bound, "entropy": out.entropy_bound, "kl": out.kl_bound}
    room = sum(c.abs() * bounds[name] for name, c in wanted.items()).double()
    exact = exactly(hidden, head, targets, wanted, **ref)
    assert ((together - exact).norm(dim=1) <= room + 1e-5 * exact.abs().max()).all()


def test_the_bound_holds_where_missing_terms_have_both_signs():
    """Lists cut at 1/4, of rows whose entropy is above log 4: what is missing cancels in its sum, not in space."""
    hidden, head, targets = problem(40, 12, 30, spread=1.5)
    params = DirectionParams("sparse", epsilon=0.25, capacity=64, max_tail=1.0)
    alone = {"entropy": torch.ones(40)}
    got, out = direction(linear_logps, hidden, head, targets, alone, direction=params, **ENTROPY)
    assert not len(out.diffuse)
    wrong = (got - exactly(hidden, head, targets, alone)).norm(dim=1)
    assert (wrong <= out.entropy_bound.double() + 1e-6).all()
    _, radius = head.centre(hidden.device)
    assert (out.entropy_bound > 0).all() and out.entropy_bound.max() < 20 * radius


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reference", [False, True])
def test_listed_and_diffuse_rows_mix(path, reference):
    sure, head, t1 = peaked(20, 2500, 32, confidence=1.3)
    hidden = torch.cat([sure, 0.05 * torch.randn(7, 32, generator=torch.Generator().manual_seed(5))])
    targets = torch.cat([t1, torch.arange(7) * 300])
    ref = {"ref_hidden": hidden + 0.05 * torch.randn(27, 32, generator=torch.Generator().manual_seed(6))}
    ref = ref if reference else {}
    given = hidden, head, targets, coefficients(27, reference)
    settings = {"path": path, "direction": DirectionParams("sparse", capacity=256), "kl": reference, **ENTROPY, **ref}
    got, out = direction(linear_logps, *given, **settings)
    exact = exactly(*given, **ref)
    assert set(range(20, 27)) <= set(out.diffuse.tolist()) and len(out.diffuse) < 20
    assert (got - exact).norm() <= 6e-3 * exact.norm()
    diffuse = out.diffuse
    assert (got - exact)[diffuse].norm() <= 2e-5 * exact[diffuse].norm()
    assert (out.entropy_bound[diffuse] < 1e-4).all()


@pytest.mark.parametrize("path", ["torch", "cublas"] if HAS_TRITON else ["torch"])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_rows_that_need_no_gradient_get_none(path, kind):
    hidden, head, targets = peaked(8, 700, 16)
    wanted = torch.tensor([True, False] * 4)
    given = hidden, head, targets, {"entropy": torch.ones(8)}
    some, _ = direction(linear_logps, *given, wanted=wanted, path=path, direction=kind, **ENTROPY)
    everything, _ = direction(linear_logps, *given, path=path, direction=kind, **ENTROPY)
    assert (some[~wanted] == 0).all() and everything[~wanted].any()
    torch.testing.assert_close(some[wanted], everything[wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("how", ["sparse", "dense"])
def test_a_quantized_head_equals_its_own_dequantized_weights(path, kind, how):
    hidden, head, targets = peaked(6, 777, 128)
    small = head.quantized(kind)
    dense = Head(small.tile(0, 777, torch.empty(777, 128))[0])
    wanted, settings = coefficients(6, False), {"path": path, "direction": how, "workspace_mib": 1, **ENTROPY}
    got, _ = direction(linear_logps, hidden, small, targets, wanted, **settings)
    exact = exactly(hidden, dense, targets, wanted)
    assert (got - exact).norm() <= 2e-2 * exact.norm() if how == "sparse" else (got - exact).norm() < 1e-5
    same, _ = direction(linear_logps, hidden, dense, targets, wanted, **settings)
    torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_trainable_head_gets_its_gradients(bias, softcap):
    hidden, head, targets = problem(9, 257, 12, bias=bias, softcap=softcap, spread=3.0)
    wanted = coefficients(9, False)
    rebuild = lambda xs: Head(xs[1], xs[2] if bias else None, 1.5, softcap)
    leaves = [hidden, head.weight] + ([head.bias] if bias else [])
    for needs in itertools.product([False, True], repeat=2):
        wants = [*needs, True][: len(leaves)]
        if not any(wants):
            continue
        exact = [x.double().requires_grad_(w) for x, w in zip(leaves, wants)]
        mine = [x.clone().requires_grad_(w) for x, w in zip(leaves, wants)]
        for fn, xs, settings in (
            (linear_logps_ref, exact, {}),
            (linear_logps, mine, {"workspace_mib": 1, "direction": "dense", **ENTROPY}),
        ):
            out = fn(xs[0], rebuild(xs), targets, temperature=0.6, **settings)
            sum((getattr(out, name) * c).sum() for name, c in wanted.items()).backward()
        for a, b, w in zip(mine, exact, wants):
            assert (a.grad is not None) == w
            if w:
                torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", [*PATHS, "trainable"])
@pytest.mark.parametrize("how", ["sparse", "dense"])
def test_forbidden_tokens_pull_at_nothing(path, how):
    """A bias of -inf, for an entry and even for a target, whose own log-prob then gets no gradient."""
    hidden, head, targets = peaked(4, 200, 16)
    bias = torch.zeros(200)
    bias[[7, 150]] = -torch.inf
    targets[targets == 7], targets[1] = 8, 150
    allowed = torch.ones(200, dtype=torch.bool)
    allowed[[7, 150]] = False
    wanted = {"entropy": torch.tensor([1.0, 2.0, -1.0, 0.5])}
    exact = exactly(hidden, Head(head.weight[allowed]), torch.zeros(4, dtype=torch.long), wanted)
    h, w = hidden.clone().requires_grad_(), head.weight.clone().requires_grad_(path == "trainable")
    settings = {"path": None if path == "trainable" else path, "direction": how, **ENTROPY}
    out = linear_logps(h, Head(w, bias), targets, **settings)
    (out.entropy * wanted["entropy"]).sum().backward()
    torch.testing.assert_close(h.grad.double(), exact, rtol=2e-2 if how == "sparse" else 1e-4, atol=2e-3)


@pytest.mark.parametrize("path", PATHS)
def test_large_logits_stay_finite(path):
    hidden, head, targets = problem(5, 300, 8)
    given = hidden / hidden.norm(dim=1, keepdim=True) * 1e4, head, targets, coefficients(5, False)
    for how in ("auto", "dense"):
        got, _ = direction(linear_logps, *given, path=path, direction=how, **ENTROPY)
        assert got.isfinite().all()


def flops(hidden, head, targets, **kwargs):
    """FLOP forward and backward, by NVH."""
    h = hidden.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = linear_logps(h, head, targets, **ENTROPY, **kwargs)
        loss = out.logps.sum() - 0.01 * out.entropy.sum() + (0 if out.kl is None else out.kl.sum())
        loss.backward()
    return counter.get_total_flops() / (hidden.numel() * head.shape[0]), out


def test_the_bonus_on_rows_of_a_trained_model_costs_no_second_product():
    hidden, head, targets = peaked(64, 32768, 256)
    listed, out = flops(hidden, head, targets, direction="sparse")
    assert listed <= 2.3 and len(out.diffuse) == 0 and 0.2 < out.entropy.mean() < 1.0
    with_reference, _ = flops(hidden, head, targets, direction="sparse", ref_hidden=hidden + 0.01, kl=True)
    assert with_reference <= 4.3  # the reference's own product, and nothing else
    assert flops(hidden, head, targets, direction="dense")[0] == pytest.approx(6, rel=0.02)


@pytest.mark.parametrize(
    # Fused, the dense product's tiles are folded by another kernel than those of a pass without gradient.
    "path,how",
    [pair for pair in itertools.product(PATHS, ["sparse", "dense"]) if pair != ("fused", "dense")],
)
def test_scoring_without_a_gradient_has_the_same_bits(path, how):
    """In tiles that are smaller than those of a sweep without this gradient."""
    hidden, head, targets = peaked(24, 5000, 64)
    given = {"path": path, "workspace_mib": 1, "direction": how, **ENTROPY}
    learnt = linear_logps(hidden.clone().requires_grad_(), head, targets, **given)
    with torch.no_grad():
        frozen = linear_logps(hidden.clone().requires_grad_(), head, targets, **given)
    assert torch.equal(learnt.logps, frozen.logps) and torch.equal(learnt.entropy, frozen.entropy)
    assert learnt.entropy.requires_grad and not frozen.entropy.requires_grad and frozen.entropy_bound is None


@pytest.mark.parametrize("trainable", [False, True])
def test_only_who_asks_gets_a_gradient(trainable):
    hidden, head, targets = peaked(5, 90, 16)
    head.weight.requires_grad_(trainable)
    out = linear_logps(hidden.requires_grad_(), head, targets, entropy=True)
    assert out.logps.requires_grad and not out.entropy.requires_grad and out.entropy_bound is None
    with pytest.raises(ValueError, match="entropy=True"):
        linear_logps(hidden, head, targets, entropy_gradient=True)


def test_the_direction_loses_less_than_a_third_of_what_bf16_logits_lose():
    hidden, head, targets = peaked(96, 50257, 256)
    head = Head(head.weight.bfloat16().float())
    hidden = hidden.bfloat16().float()
    alone = {"entropy": torch.ones(96)}
    exact = exactly(hidden, head, targets, alone)
    w = head.weight
    logp = (hidden.bfloat16() @ w.bfloat16().T).float().log_softmax(-1)
    rounded = -(logp.exp() * (logp - (logp.exp() * logp).sum(1, keepdim=True))) @ w
    got, out = direction(linear_logps, hidden, head, targets, alone, direction="sparse", **ENTROPY)
    assert len(out.diffuse) < 10
    assert (got - exact).norm() < (rounded - exact).norm() / 3


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("path", [None, "torch"])
def test_bytes_of_a_sweep_with_the_bonus(path, reference):
    """Every row diffuse, the worst case: a direction more for each row, and the same workspace."""
    n, v, h, mib = 4096, 151_936, 2048, 64
    meta = lambda *shape, of=torch.bfloat16: torch.empty(*shape, dtype=of, device="meta")
    weight, peaks = meta(v, h), {}
    for bonus in (False, True):
        hidden = meta(n, h).requires_grad_()
        with Ledger() as ledger:
            out = linear_logps(
                hidden, weight, meta(n, of=torch.long), entropy=True, entropy_gradient=bonus, workspace_mib=mib,
                path=path, ref_hidden=meta(n, h) if reference else None, kl=reference, direction="dense",
            )  # fmt: skip
            held = ledger.live
            directions = (1 + reference + bonus) * n * h * 4
            assert 0 <= held - directions <= 30 * n * 4
            assert ledger.peak <= mib * 2**20 + held + (2 * n * h if reference else 0)
            loss = out.logps.sum() + out.entropy.sum() if bonus else out.logps.sum()
            loss.backward()
        peaks[bonus] = ledger.peak
    assert 0.8 * n * h * 4 <= peaks[True] - peaks[False] < 1.2 * n * h * 4  # tiles fill the workspace as they can


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4"])
@pytest.mark.parametrize("how", ["sparse", "dense"])
def test_compiled_code_gives_the_same_values_and_gradients(kind, how):
    hidden, head, targets = peaked(10, 300, 64, bias=True)
    head = head if kind == "dense" else head.quantized(kind)
    ref, c = hidden + 0.1, coefficients(10, True)

    def step(hidden):
        out = linear_logps(hidden * 1.0, head, targets, ref_hidden=ref, kl=True, direction=how, **ENTROPY)
        bound = 0 if out.entropy_bound is None else out.entropy_bound.sum()
        return sum((getattr(out, name) * c[name]).sum() for name in c) + bound

    torch.testing.assert_close(*eager_and_compiled(step, hidden))


def test_compiled_code_with_nothing_but_the_entropy():
    hidden, head, targets = peaked(10, 300, 64)
    step = lambda h: linear_logps(h * 1.0, head, targets, direction="sparse", **ENTROPY).entropy.sum()
    results = eager_and_compiled(step, hidden)
    torch.testing.assert_close(*results)
    exact = exactly(hidden, head, targets, {"entropy": torch.ones(10)})
    assert (results[0][1] - exact).norm() < 1e-2 * exact.norm()
