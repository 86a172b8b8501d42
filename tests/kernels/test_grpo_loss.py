"""The fused loss against objective.py in float64, and against what objective.py gets wrong in float32."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from lowvram_grpo.kernels import grpo_loss as module
from lowvram_grpo.kernels.grpo_loss import FusedLoss, LaunchConfig, fused_grpo_loss

from lowvram_grpo.objective import LossTerms, Objective, grpo_loss, token_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ("kl_sum", "low_clipped", "high_clipped", "region_clipped", "ratio_min", "ratio_max", "tokens")


def problem(B=5, T=63, *, spread=0.3, seed=0, loss_type="dapo") -> dict[str, torch.Tensor]:
    """float32 inputs; row 1 is all masked, masks have holes, and one advantage is 0."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    logps = -normal(B, T).abs() * 2
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[0], mask[min(1, B - 1)] = True, False
    advantages = normal(B)
    advantages[B // 2] = 0.0
    p = {
        "logps": logps,
        "old_logps": logps + normal(B, T) * spread,
        "ref_logps": logps + normal(B, T) * spread,
        "advantages": advantages,
        "mask": mask,
        "weights": token_weights(mask, loss_type, 2 * T),
        "kl": normal(B, T).abs(),
        "entropy": normal(B, T).abs(),
    }
    return {name: x.to(DEVICE) for name, x in p.items()}


def select(p: dict, objective: Objective, old: bool = True) -> dict:
    """The arguments that this objective takes."""
    exact = objective.kl_estimator == "exact"
    dropped = {"ref_logps": None} if exact else {"kl": None}
    return {**p, **dropped, **({} if old else {"old_logps": None})}


def eager(p: dict, objective: Objective, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss, gradients and metrics of objective.py, in float64 numbers."""
    cast = {k: x.to(dtype) if x is not None and x.is_floating_point() else x for k, x in p.items() if k != "entropy"}
    leaves = {k: cast[k].detach().clone().requires_grad_() for k in ("logps", "kl") if cast[k] is not None}
    weights = cast["weights"].detach().clone().requires_grad_()
    terms: LossTerms = grpo_loss(**{**cast, **leaves, "weights": weights}, objective=objective)
    terms.loss.backward()
    mask = p["mask"].bool()
    ratio = terms.ratio.expand_as(mask)[mask]
    found = {
        "loss": terms.loss.detach(),
        **{f"d_{k}": x.grad for k, x in leaves.items()},
        "kl_sum": (terms.kl * mask).sum() if terms.kl is not None else None,
        "low_clipped": terms.low_clipped.sum(),
        "high_clipped": terms.high_clipped.sum(),
        "region_clipped": (terms.low_clipped | terms.high_clipped).sum(),
        "ratio_min": ratio.min() if ratio.numel() else torch.tensor(math.inf),
        "ratio_max": ratio.max() if ratio.numel() else torch.tensor(-math.inf),
        "tokens": mask.sum(),
        # What the rounding of a sum goes by; the loss of a token is the slope of its weight.
        "loss scale": (weights.grad * weights.detach())[mask].abs().sum(),
        "kl_sum scale": (terms.kl * mask).abs().sum() if terms.kl is not None else None,
    }
    return {name: x.double() for name, x in found.items() if x is not None}


def fused(p: dict, objective: Objective, op=fused_grpo_loss, entropy: bool = False) -> dict[str, torch.Tensor]:
    leaves = {k: p[k].detach().requires_grad_() for k in ("logps", "kl") if p[k] is not None}
    given = {**p, **leaves, "entropy": p["entropy"] if entropy else None}
    out: FusedLoss = op(**given, objective=objective)
    out.loss.backward()
    found = {"loss": out.loss.detach(), **{f"d_{k}": x.grad for k, x in leaves.items()}}
    found |= {name: getattr(out, name) for name in METRICS}
    return {name: x.double() for name, x in found.items() if x is not None}


def check(p: dict, objective: Objective, **kwargs) -> None:
    exact, plain = eager(p, objective, torch.float64), eager(p, objective, torch.float32)
    scales = {name: exact.pop(f"{name} scale") for name in ("loss", "kl_sum") if f"{name} scale" in exact}
    got = fused(p, objective, **kwargs)
    assert got.keys() == exact.keys()
    for name, e in exact.items():
        if name in ("low_clipped", "high_clipped", "region_clipped", "tokens"):
            # A ratio within rounding of a bound may count in one precision and not in the other: float32 has the say.
            assert got[name] == plain[name], name
            continue
        if not bool(e.isfinite().all()):
            assert torch.equal(got[name], e), name
            continue
        bound = 2 * (plain[name] - e).abs().max() + 2e-7 * scales.get(name, e.abs().max()) + 1e-9
        assert (got[name] - e).abs().max() <= bound, (name, float((got[name] - e).abs().max()), float(bound))


@pytest.fixture(params=[None, 64], ids=["one block", "blocks of 64"])
def block(request, monkeypatch):
    """Rows of more than one block, without rows of thousands of tokens in the interpreter."""
    if request.param:
        monkeypatch.setattr(module, "launch_config", lambda tokens: LaunchConfig(request.param, 2))


@pytest.mark.parametrize("estimator", ["none", "k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("old", [True, False], ids=["old", "no old"])
@pytest.mark.parametrize("extra", [{}, {"epsilon_high": 0.28}, {"delta": 1.25}, {"delta": 1.1, "epsilon_high": 0.05}])
def test_every_objective(estimator, level, old, extra):
    objective = Objective(
        beta=0.0 if estimator == "none" else 0.3,
        kl_estimator="k3" if estimator == "none" else estimator,
        importance_sampling_level=level,
        **extra,
    )
    p = select(problem(spread=0.4 if level == "token" else 2.0), objective, old)
    if estimator == "none":
        p["ref_logps"] = None
    check(p, objective)


@pytest.mark.parametrize("B,T", [(1, 1), (3, 63), (7, 130), (2, 64), (5, 128)])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_every_shape_and_loss_type(B, T, level, loss_type, block):
    objective = Objective(beta=0.2, importance_sampling_level=level)
    p = select(problem(B, T, seed=T, loss_type=loss_type), objective)
    if B == 1:
        p["mask"] = torch.ones_like(p["mask"])
        p["weights"], p["advantages"] = torch.ones_like(p["logps"]), torch.ones_like(p["advantages"])
    check(p, objective)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_log_ratios_beyond_every_bound(level, estimator):
    """exp is as good at 20 as at 0, and nothing pulls on a log-prob that was clamped."""
    objective = Objective(beta=0.1, kl_estimator=estimator, importance_sampling_level=level, epsilon=0.5)
    check(select(problem(spread=15.0), objective), objective)
    far = select(problem(3, 63, spread=0.0), objective)
    for shift in (19.0, 20.0, 20.5, -20.0, -21.0, 300.0):
        far["old_logps"], far["ref_logps"] = far["logps"] - shift, far["logps"] + shift
        check(far, objective)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bounds", [
    {"epsilon": 0.0},
    {"epsilon": 0.0, "epsilon_high": 0.2},
    {"epsilon": 0.2, "epsilon_high": 0.0},
    {"delta": 1.0},
    {"delta": 1.0, "epsilon": 0.0},
    {"delta": 0.9},
    {"epsilon": 1.0, "epsilon_high": 1e9},
])  # fmt: skip
@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0])
def test_slopes_at_the_edges_are_those_of_autograd(level, bounds, shift):
    """The ratio exactly on a bound, for advantages of both signs and 0; the log-ratio exactly on the clamp."""
    objective = Objective(beta=0.0, importance_sampling_level=level, **bounds)
    p = select(problem(6, 8), objective)
    p["logps"] = torch.zeros_like(p["logps"])
    p["old_logps"] = torch.full_like(p["logps"], -shift)
    p["ref_logps"] = None
    p["advantages"] = torch.tensor([1.0, -1.0, 0.0, 0.7, -0.7, -0.0], device=DEVICE)
    p["mask"][1] = True
    expected, got = eager(p, objective, torch.float32), fused(p, objective)
    torch.testing.assert_close(got["d_logps"], expected["d_logps"], rtol=1e-6, atol=0)
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, about the junk
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_positions_may_hold_anything(level, estimator, junk):
    objective = Objective(beta=0.3, kl_estimator=estimator, importance_sampling_level=level)
    clean = select(problem(), objective)
    clean["advantages"][1] = 0.0
    keep = clean["mask"]
    dirty = {k: x.masked_fill(~keep, junk) if x is not None and x.shape == keep.shape and k != "mask" else x
             for k, x in clean.items()}  # fmt: skip
    dirty["advantages"] = clean["advantages"].clone()
    dirty["advantages"][1] = junk  # the row without a token
    expected, got = fused(clean, objective, entropy=True), fused(dirty, objective, entropy=True)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    out = fused_grpo_loss(**dirty, objective=objective)
    assert torch.equal(out.coefficient.double(), expected["d_logps"])
    torch.testing.assert_close(out.entropy_sum, (clean["entropy"] * keep).sum())


def test_an_unmasked_nan_is_not_swallowed():
    for level in ("token", "sequence"):
        objective = Objective(importance_sampling_level=level)
        for name in ("logps", "old_logps", "ref_logps"):
            p = select(problem(), objective)
            p[name][0, 3] = math.nan
            assert fused_grpo_loss(**p, objective=objective).loss.isnan(), (level, name)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_nothing_to_learn_from(level):
    objective = Objective(importance_sampling_level=level)
    p = select(problem(), objective)
    p["mask"] = torch.zeros_like(p["mask"])
    check(p, objective)
    empty = {k: None if x is None else x[:0] for k, x in p.items()}
    out = fused_grpo_loss(**empty, objective=objective)
    assert out.loss == 0 and out.tokens == 0 and out.coefficient.shape == (0, 63) and out.ratio_min == math.inf


def test_small_differences_keep_their_kl():
    """k3 of policies that differ by 1e-4 is 5e-9; exp(d) - 1 - d in float32 has none of its digits."""
    objective = Objective(beta=1.0, kl_estimator="k3")
    p = select(problem(spread=0.0), objective)
    p["logps"] = torch.zeros_like(p["logps"])
    for scale in (1e-6, 1e-4, 1e-2, 0.3, 1.0, 3.0):
        p["ref_logps"] = scale * torch.linspace(-1, 1, p["logps"].numel(), device=DEVICE).view_as(p["logps"])
        p["old_logps"] = None
        check(p, objective)
        exact, got = eager(p, objective, torch.float64), fused(p, objective)
        assert abs(got["kl_sum"] / exact["kl_sum"] - 1) < 1e-6


def test_strides_and_dtypes():
    objective = Objective(beta=0.2)
    p = select(problem(5, 63), objective)
    expected = fused(p, objective)
    columns = {k: x.t().contiguous().t() if x is not None and x.ndim == 2 else x for k, x in p.items()}
    wide = {k: torch.cat([x, x], 1)[:, :63] if x is not None and x.ndim == 2 else x for k, x in p.items()}
    wide["advantages"] = torch.stack([p["advantages"]] * 2, 1)[:, 0]
    numbers = {**p, "mask": p["mask"].long()}
    for other in (columns, wide, numbers, {**p, "mask": p["mask"].float()}):
        for name, value in fused(other, objective).items():
            assert torch.equal(value, expected[name]), name
    p["weights"] = p["weights"][:1, :1].expand(5, 63)
    check(p, objective)
    half = p["logps"].bfloat16().requires_grad_()
    out = fused_grpo_loss(**{**p, "logps": half}, objective=objective)
    out.loss.backward()
    assert half.grad.dtype == torch.bfloat16 and torch.equal(half.grad, out.coefficient.bfloat16())


def test_micro_batches_add_up_and_repeat_bit_for_bit():
    objective = Objective(beta=0.2, importance_sampling_level="sequence")
    p = select(problem(6, 63), objective)
    whole = fused(p, objective)
    for name, value in fused(p, objective).items():
        assert torch.equal(value, whole[name])
    parts = [fused({k: None if x is None else x[i : i + 1] for k, x in p.items()}, objective) for i in range(6)]
    torch.testing.assert_close(sum(part["loss"] for part in parts), whole["loss"], rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.cat([part["d_logps"] for part in parts]), whole["d_logps"])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_is_that_of_finite_differences(level):
    """Of the kernel's own loss, so that loss and gradient agree without the oracle."""
    objective = Objective(beta=0.2, importance_sampling_level=level)
    p = select(problem(3, 9, spread=0.02), objective)
    p["weights"] = torch.ones_like(p["weights"])
    direction = torch.randn(3, 9, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    slope = (fused(p, objective)["d_logps"] * direction).sum()
    step = 3e-3
    at = lambda x: fused({**p, "logps": p["logps"] + x * direction}, objective)["loss"]
    torch.testing.assert_close((at(step) - at(-step)) / (2 * step), slope, rtol=2e-3, atol=2e-3)


def test_upstream_gradient_scales_both():
    objective = Objective(beta=0.2, kl_estimator="exact")
    p = select(problem(), objective)
    leaves = {k: p[k].clone().requires_grad_() for k in ("logps", "kl")}
    out = fused_grpo_loss(**{**p, **leaves}, objective=objective)
    (out.loss * 3).backward()
    assert torch.equal(leaves["logps"].grad, 3 * out.coefficient)
    assert torch.equal(leaves["kl"].grad, 3 * out.kl_coefficient)
    carried = [n for n, x in out._asdict().items() if x is not None and x.requires_grad]
    assert carried == ["loss"]


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_meta_and_fake_tensors(estimator):
    from torch._subclasses.fake_tensor import FakeTensorMode

    objective = Objective(kl_estimator=estimator)
    p = select(problem(), objective)
    real = fused_grpo_loss(**p, objective=objective)
    mode = FakeTensorMode()
    for to in (lambda x: x.to("meta"), mode.from_tensor):
        there = {k: None if x is None else to(x) for k, x in p.items()}
        there["logps"].requires_grad_()
        out = fused_grpo_loss(**there, objective=objective)
        for a, b in zip(out, real):
            assert (a is None) == (b is None)
            assert a is None or (a.shape == b.shape and a.dtype == b.dtype)
        out.loss.backward()
        assert there["logps"].grad.shape == real.coefficient.shape


@pytest.mark.parametrize("estimator", [0, 3, 4])
def test_opcheck(estimator):
    p = problem(3, 9)
    logps, kl = p["logps"].requires_grad_(), p["kl"].requires_grad_() if estimator == 4 else None
    args = (logps, p["old_logps"], p["ref_logps"], kl, p["advantages"], p["mask"], p["weights"], p["entropy"],
            0.1, 0.8, 1.2, math.inf, estimator, estimator == 3)  # fmt: skip
    torch.library.opcheck(module._grpo_loss_op, args)


BREAKS = {
    "sign of the advantage": lambda p, o: ({**p, "advantages": -p["advantages"]}, o),
    "no upper clip": lambda p, o: (p, Objective(beta=o.beta, epsilon=o.epsilon, epsilon_high=1e9)),
    "no KL": lambda p, o: (p, Objective(beta=0.0, epsilon=o.epsilon)),
    "k2 for k3": lambda p, o: (p, Objective(beta=o.beta, kl_estimator="k2")),
    "reference and old swapped": lambda p, o: ({**p, "ref_logps": p["old_logps"], "old_logps": p["ref_logps"]}, o),
    "sequence for token": lambda p, o: (p, Objective(beta=o.beta, importance_sampling_level="sequence")),
    "one token more": lambda p, o: ({**p, "mask": torch.ones_like(p["mask"])}, o),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_comparison_fails_when_the_kernel_is_wrong(name):
    objective = Objective(beta=0.3)
    p = select(problem(), objective)
    check(p, objective)

    def broken(objective, **given):
        given, objective = BREAKS[name](given, objective)
        return fused_grpo_loss(**given, objective=objective)

    with pytest.raises(AssertionError):
        check(p, objective, op=broken)


SOURCE_BREAKS = {
    "the minimum's slope at a tie": ("0.5 * (free_slope + held_slope)", "free_slope + held_slope"),
    "the clamp's slope": ("tl.where(inside, -slope * ratio, 0.0)", "-slope * ratio"),
    "the row's length": ("tl.div_rn(tl.sum(weight, 0) * row_slope, n)", "tl.sum(weight, 0) * row_slope"),
    "the KL's slope": ("slope = -(value + d)", "slope = value + d"),
    "the mask of the gradient": ("tl.where(m, pull, 0.0), mask=t < T", "pull, mask=t < T"),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", SOURCE_BREAKS)
def test_a_kernel_with_one_wrong_line_is_caught(name, tmp_path):
    """A copy of the module with the line changed must fail the very checks that the module passes."""
    right, wrong = SOURCE_BREAKS[name]
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1
    copy = tmp_path / "broken_loss.py"
    copy.write_text(
        source.replace(right, wrong).replace("lowvram_grpo::", f"broken_{list(SOURCE_BREAKS).index(name)}::")
    )
    spec = importlib.util.spec_from_file_location("broken_loss", copy)
    broken = importlib.util.module_from_spec(spec)
    sys.modules["broken_loss"] = broken  # dataclasses look their module up
    spec.loader.exec_module(broken)
    with pytest.raises(AssertionError):
        _small_suite(broken.fused_grpo_loss)
    _small_suite(fused_grpo_loss)


def _small_suite(op) -> None:
    for level in ("token", "sequence"):
        objective = Objective(beta=0.3, importance_sampling_level=level, epsilon_high=1e9)
        p = select(problem(), objective)
        check(p, objective, op=op)
        check({**p, "old_logps": None}, objective, op=op)
        check({**p, "old_logps": p["logps"] - 25, "advantages": -p["advantages"].abs()}, objective, op=op)
        p["advantages"][1] = math.nan
        assert fused(p, objective, op=op)["d_logps"].isfinite().all()


def test_bad_input_is_named(monkeypatch):
    p = select(problem(), Objective())
    with pytest.raises(ValueError, match="float64"):
        fused_grpo_loss(**{**p, "logps": p["logps"].double()}, objective=Objective())
    with pytest.raises(ValueError, match=r"weights \(5, 62\) does not fit"):
        fused_grpo_loss(**{**p, "weights": p["weights"][:, 1:]}, objective=Objective())
    with pytest.raises(ValueError, match="advantages"):
        fused_grpo_loss(**{**p, "advantages": p["advantages"][1:]}, objective=Objective())
    with pytest.raises(ValueError, match="unknown KL estimator 'k9'"):
        fused_grpo_loss(**p, objective=Objective(kl_estimator="k9"))
    with pytest.raises(ValueError, match="is for kl_estimator 'exact'"):
        fused_grpo_loss(**{**p, "kl": p["logps"]}, objective=Objective())
    with pytest.raises(ValueError, match="needs kl"):
        fused_grpo_loss(**p, objective=Objective(kl_estimator="exact"))
    from lowvram_grpo.kernels import runtime

    if DEVICE == "cpu":
        monkeypatch.setattr(runtime, "_INTERPRETED", False)
        with pytest.raises(RuntimeError, match=r"runs on a GPU, not on cpu; use objective\.grpo_loss"):
            fused_grpo_loss(**p, objective=Objective())
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=r"needs Triton, .*; use objective\.grpo_loss\."):
        fused_grpo_loss(**p, objective=Objective())
