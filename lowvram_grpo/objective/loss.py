"""The loss of a token: what each loss type makes of the ratio, and the KL beside it.

With rho the ratio of the policy to what it was (of a token, or at sequence level the geometric mean of a completion), A
the advantage, f the factor of factor.py, w the weight of weights.py, sg what carries no gradient:

    L        = sum_it w_it [ f_it P_it + beta rho_it KL_it ]            use_bias_correction_kl; without it beta KL_it
    rho_it   = exp(logp_it - old_it)                                    token level, GRPO (arXiv:2402.03300)
    rho_i    = exp(1/|o_i| sum_t (logp_it - old_it))                    sequence level, GSPO 2025 (arXiv:2507.18071)

    P = -min(min(rho, delta) A, clip(rho, 1 - eps, 1 + eps_high) A)     grpo, bnpo, dr_grpo, dapo, luspo
    P = -sg(min(rho, eps_high)) A logp                                  cispo, MiniMax-M1 2025 (arXiv:2506.13585)
    P = -4 / tau sigmoid(tau (rho - 1)) A                               sapo 2025 (arXiv:2511.20347); tau_pos where
                                                                        A > 0, tau_neg elsewhere
    P = -A logp,  phi in f                                              vespo 2026 (arXiv:2602.10693)

Sources: GRPO, Shao et al. 2024, eq. 3; clip-higher (eps_high), DAPO, Yu et al. 2025 (arXiv:2503.14476); two-sided
clipping (delta), INTELLECT-2 2025 (arXiv:2505.07291); cispo with an upper bound alone, ScaleRL 2025 (arXiv:2510.13786);
KL estimators, Schulman 2020; the ratio before the KL, DeepSeek-V3.2 2025 (arXiv:2512.02556).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# exp() of a log-ratio beyond this is a number no clipped objective can use; it also keeps k3 finite.
MAX_LOG_RATIO = 20.0
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# Those that differ in nothing but their denominators.
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@dataclass(frozen=True)
class Objective:
    """The constants of the loss; see GRPOConfig for their meaning."""

    beta: float = 0.04
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    kl_estimator: str = "k3"
    importance_sampling_level: str = "token"
    loss_type: str = "grpo"
    use_bias_correction_kl: bool = True
    sapo_temperature_neg: float = 1.05
    sapo_temperature_pos: float = 1.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0

    @property
    def upper(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def per_sequence(self) -> bool:
        return self.importance_sampling_level == "sequence"

    @property
    def corrects_kl(self) -> bool:
        """The exact KL is no estimate: its expectation over the sampled token is itself, and a ratio only noise."""
        return self.use_bias_correction_kl and self.kl_estimator != "exact"


class LossTerms(NamedTuple):
    """One micro-batch. `loss` is a scalar with gradient; the rest are (B, T) without, for the metrics.

    Attributes:
        kl: with the ratio before it, as the loss has it.
        low_clipped, high_clipped: tokens that the bounds hold; of cispo those above its bound whose advantage is
            positive, nothing of sapo and vespo, which have no bounds.
    """

    loss: Tensor
    kl: Tensor | None
    ratio: Tensor
    low_clipped: Tensor
    high_clipped: Tensor


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp whose slope is 1 on a bound and not only between them; a NaN stays one.

    torch's own has slope 1 there before 2.14 and 0 from then on. The first update of a rollout has ratio 1 everywhere,
    so with epsilon 0 (or delta 1) half of its gradient (or all) would depend on the release.
    """
    return torch.where(x > high, high, torch.where(x < low, low, x))


def by_condition(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers, in the dtype of `like` and without a copy from the host."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def kl_divergence(logps: Tensor, ref_logps: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (Schulman 2020, "Approximating KL").

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 with d = ref_logp - logp. k1's gradient has expectation zero, so it is a
    metric rather than a loss; k2's gradient is unbiased, k3 is the paper's choice. Times the ratio, whose gradient
    makes up for the samples' own dependence on the policy, k1 and k3 are unbiased too (arXiv:2512.02556).

    The exact KL is no estimate and no function of these: it is summed over the vocabulary and given to `grpo_loss`.

    Returns:
        (B, T) float32, differentiable in `logps`, 0 where masked. d is masked before exp: a masked inf would still
        turn the gradient into NaN.
    """
    d = _clamp(torch.where(mask.bool(), ref_logps - logps, 0.0), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(d) - d
    raise ValueError(f"no sampled KL estimator is called {estimator!r}")


def check_kl(objective: Objective, ref_logps: Tensor | None, kl: Tensor | None) -> None:
    """The KL has one source: the caller for "exact", the reference's log-probs for the others."""
    exact = objective.kl_estimator == "exact"
    if kl is not None and not exact:
        raise ValueError(f"kl is for kl_estimator 'exact'; {objective.kl_estimator!r} takes ref_logps.")
    if exact and kl is None and (objective.beta or ref_logps is not None):
        raise ValueError("kl_estimator 'exact' needs kl, the KL of each token's whole distribution.")


def check_factor(objective: Objective, factor: Tensor | None) -> None:
    """vespo without its weight would be plain policy gradient, off policy too."""
    if objective.loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {objective.loss_type!r}")
    if objective.loss_type == "vespo" and factor is None:
        raise ValueError("loss_type 'vespo' needs factor, with vespo_weight in it.")


def grpo_loss(
    logps: Tensor,  # (B, T)
    old_logps: Tensor | None,  # (B, T), or None for the first update of a rollout: the ratio is then exactly 1
    ref_logps: Tensor | None,  # (B, T), or None with beta 0
    advantages: Tensor,  # (B,)
    mask: Tensor,  # (B, T)
    weights: Tensor,  # (B, T) from token_weights
    objective: Objective,
    kl: Tensor | None = None,  # (B, T) exact KL of each token's distribution, with kl_estimator "exact" alone
    factor: Tensor | None = None,  # (B, T) or (B, 1) without gradient, times the policy term alone
) -> LossTerms:
    """The loss of one micro-batch; micro-batches of an update add up to its loss.

    Differentiable in `logps`, and in `kl` where it is given: with kl_estimator "exact" the caller has summed the KL
    over the whole vocabulary, `ref_logps` is not read, and masked positions of `kl` may hold anything.

    Raises:
        ValueError: a KL that does not belong to the estimator, or an exact one that is missing; vespo without a factor.
    """
    check_kl(objective, ref_logps, kl)
    check_factor(objective, factor)
    mask = mask.bool()
    ratio = _ratio(logps, old_logps, mask, objective.per_sequence)
    a = advantages[:, None]
    token_loss = _policy_term(logps, ratio, a, objective)
    if factor is not None:
        token_loss = token_loss * torch.where(mask, factor, 0.0)
    if kl is not None:
        kl = torch.where(mask, kl, 0.0)
    elif ref_logps is not None:
        kl = kl_divergence(logps, ref_logps, mask, objective.kl_estimator)
        kl = kl * ratio if objective.corrects_kl else kl
    if kl is not None:
        token_loss = token_loss + objective.beta * kl
    loss = torch.where(mask, token_loss * weights, 0.0).sum()
    low, high = _clipped(ratio.detach(), a, objective)
    return LossTerms(loss, None if kl is None else kl.detach(), ratio.detach(), mask & low, mask & high)


def _ratio(logps: Tensor, old_logps: Tensor | None, mask: Tensor, per_sequence: bool) -> Tensor:
    """(B, T), at sequence level the same number in a row."""
    log_ratio = torch.where(mask, logps - (logps.detach() if old_logps is None else old_logps), 0.0)
    if per_sequence:
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
    return _clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _policy_term(logps: Tensor, ratio: Tensor, a: Tensor, objective: Objective) -> Tensor:
    """P (B, T) of the loss type, for advantages `a` (B, 1)."""
    if objective.loss_type == "sapo":
        tau = by_condition(a > 0, objective.sapo_temperature_pos, objective.sapo_temperature_neg, ratio)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a
    if objective.loss_type == "cispo":
        return -_clamp(ratio.detach(), -torch.inf, objective.upper) * a * logps
    if objective.loss_type == "vespo":
        return -a * logps
    free = ratio if objective.delta is None else _clamp(ratio, -torch.inf, objective.delta)
    return -torch.minimum(free * a, _clamp(ratio, 1 - objective.epsilon, 1 + objective.upper) * a)


def _clipped(ratio: Tensor, a: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(B, T) bool each, counted as TRL does: after delta."""
    if objective.loss_type == "cispo":
        return torch.zeros_like(ratio, dtype=torch.bool), (ratio > objective.upper) & (a > 0)
    if objective.loss_type not in CLIPPED:
        return (torch.zeros_like(ratio, dtype=torch.bool),) * 2
    ratio = ratio if objective.delta is None else _clamp(ratio, -torch.inf, objective.delta)
    return (ratio < 1 - objective.epsilon) & (a < 0), (ratio > 1 + objective.upper) & (a > 0)
