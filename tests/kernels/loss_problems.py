"""Micro-batches for the fused loss, what the objective makes of them, and how near the kernel must come."""

from __future__ import annotations

import math

import torch
from lowvram_grpo.kernels.grpo_loss import FusedLoss, fused_grpo_loss

from lowvram_grpo.objective import LossTerms, Objective, grpo_loss, token_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = ("low_clipped", "high_clipped", "tokens")
METRICS = ("kl_sum", "ratio_min", "ratio_max", *COUNTS)


def problem(B=5, T=63, *, spread=0.3, seed=0, loss_type="dapo") -> dict[str, torch.Tensor]:
    """float32 inputs; row 1 is all masked, masks have holes, one advantage is 0, and factors
    have zeros."""
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
        "factor": normal(B, T).clamp(min=0),
    }
    return {name: x.to(DEVICE) for name, x in p.items()}


def select(p: dict, objective: Objective, old: bool = True, factor: bool = True) -> dict:
    """The arguments that this objective takes."""
    exact = objective.kl_estimator == "exact"
    dropped = {"ref_logps": None} if exact else {"kl": None}
    dropped |= {} if old else {"old_logps": None}
    return {**p, **dropped, **({} if factor else {"factor": None})}


def eager(p: dict, objective: Objective, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loss, gradients and metrics of the objective, in float64 numbers."""
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
        "low_clipped": terms.low_clipped.sum(1),
        "high_clipped": terms.high_clipped.sum(1),
        "ratio_min": ratio.min() if ratio.numel() else torch.tensor(math.inf),
        "ratio_max": ratio.max() if ratio.numel() else torch.tensor(-math.inf),
        "tokens": mask.sum(1),
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
        if name in COUNTS:
            # A ratio within rounding of a bound may count in one precision and not in the other: float32 has the say.
            assert torch.equal(got[name], plain[name]), name
            continue
        if not bool(e.isfinite().all()):
            assert torch.equal(got[name], e), name
            continue
        bound = 2 * (plain[name] - e).abs().max() + 2e-7 * scales.get(name, e.abs().max()) + 1e-9
        assert (got[name] - e).abs().max() <= bound, (name, float((got[name] - e).abs().max()), float(bound))
