"""The fused loss against the objective in float64, and against what that gets wrong in float32."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from loss_problems import DEVICE, check, eager, fused, problem, select
from lowvram_grpo.kernels import grpo_loss as module
from lowvram_grpo.kernels import grpo_loss_kernel as kernel
from lowvram_grpo.kernels.grpo_loss import fused_grpo_loss
from lowvram_grpo.kernels.grpo_loss_kernel import LaunchConfig

from lowvram_grpo.objective import Objective


@pytest.fixture(params=[None, 64], ids=["one block", "blocks of 64"])
def block(request, monkeypatch):
    """Rows of more than one block, without rows of thousands of tokens in the interpreter."""
    if request.param:
        monkeypatch.setattr(kernel, "launch_config", lambda tokens: LaunchConfig(request.param, 2))


@pytest.mark.parametrize("estimator", ["none", "k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("old", [True, False], ids=["old", "no old"])
@pytest.mark.parametrize("extra", [
    {},
    {"epsilon_high": 0.28, "use_bias_correction_kl": False},
    {"delta": 1.25},
    {"delta": 1.1, "epsilon_high": 0.05, "use_bias_correction_kl": False},
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.6},
    {"loss_type": "vespo", "use_bias_correction_kl": False},
])  # fmt: skip
def test_every_objective(estimator, level, old, extra):
    objective = Objective(
        beta=0.0 if estimator == "none" else 0.3,
        kl_estimator="k3" if estimator == "none" else estimator,
        importance_sampling_level=level,
        **extra,
    )
    factor = "use_bias_correction_kl" in extra  # which vespo cannot do without
    p = select(problem(spread=0.4 if level == "token" else 2.0), objective, old, factor)
    if estimator == "none":
        p["ref_logps"] = None
    check(p, objective)


@pytest.mark.parametrize("B,T", [(1, 1), (3, 63), (7, 130), (2, 64), (5, 128)])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo", "sapo", "cispo", "vespo"])
def test_every_shape_and_loss_type(B, T, level, loss_type, block):
    objective = Objective(beta=0.2, importance_sampling_level=level, loss_type=loss_type)
    p = select(problem(B, T, seed=T, loss_type=loss_type), objective)
    if B == 1:
        p["mask"] = torch.ones_like(p["mask"])
        p["weights"], p["advantages"] = torch.ones_like(p["logps"]), torch.ones_like(p["advantages"])
    check(p, objective)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("extra", [
    {"use_bias_correction_kl": False},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "sapo", "sapo_temperature_neg": 200.0},
])  # fmt: skip
def test_log_ratios_beyond_every_bound(level, estimator, extra):
    """exp is as good at 20 as at 0, and nothing pulls on a log-prob that was clamped."""
    objective = Objective(beta=0.1, kl_estimator=estimator, importance_sampling_level=level, epsilon=0.5, **extra)
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
@pytest.mark.parametrize("loss_type, junk", [
    ("grpo", math.nan), ("grpo", math.inf), ("dapo", -math.inf), ("sapo", math.nan), ("cispo", math.inf),
    ("vespo", -math.inf),
])  # fmt: skip
def test_masked_positions_may_hold_anything(level, estimator, loss_type, junk):
    objective = Objective(beta=0.3, kl_estimator=estimator, importance_sampling_level=level, loss_type=loss_type)
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
    assert out.loss == 0 and out.tokens.shape == (0,) and out.coefficient.shape == (0, 63)
    assert out.ratio_min == math.inf and out.kl_sum == 0


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
@pytest.mark.parametrize("loss_type", ["grpo", "sapo"])
def test_gradient_is_that_of_finite_differences(level, loss_type):
    """Of the kernel's own loss, so that loss and gradient agree without the oracle."""
    objective = Objective(beta=0.2, importance_sampling_level=level, loss_type=loss_type)
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
    factor = p["factor"] if estimator else None
    args = (logps, p["old_logps"], p["ref_logps"], kl, p["advantages"], p["mask"], p["weights"], factor, p["entropy"],
            0.1, 0.8, 1.2, math.inf, estimator == 3, estimator, estimator % 3, estimator == 3)  # fmt: skip
    torch.library.opcheck(module._grpo_loss_op, args)


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
    with pytest.raises(ValueError, match="'vespo' needs factor"):
        fused_grpo_loss(**{**p, "factor": None}, objective=Objective(loss_type="vespo"))
    with pytest.raises(ValueError, match="unknown loss_type 'ppo'"):
        fused_grpo_loss(**p, objective=Objective(loss_type="ppo"))
    from lowvram_grpo.kernels import runtime

    if DEVICE == "cpu":
        monkeypatch.setattr(runtime, "_INTERPRETED", False)
        with pytest.raises(RuntimeError, match=r"runs on a GPU, not on cpu; use objective\.grpo_loss"):
            fused_grpo_loss(**p, objective=Objective())
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=r"needs Triton, .*; use objective\.grpo_loss\."):
        fused_grpo_loss(**p, objective=Objective())
