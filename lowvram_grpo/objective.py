"""The GRPO objective as pure tensor functions: the single definition of the maths.

Everything works on padded (B, T) tensors of per-token log-probs; no model, no device, no state. Kernels that fuse parts
of it are held against this page.

    A_i   = (r_i - mean(r_group)) / std(r_group)                                 group_advantages
    w_it  = 1 / denominator of the loss type, 0 where masked                     token_weights
    rho   = exp(logp - old_logp)
    L     = sum_it w_it * [ -min(rho A, clip(rho, 1 - eps, 1 + eps_high) A) + beta * KL_it ]

Sources: GRPO, Shao et al. 2024 (arXiv:2402.03300) eq. 3-4; clip-higher and the token-level mean, DAPO, Yu et al. 2025
(arXiv:2503.14476); dr_grpo, Liu et al. 2025 (arXiv:2503.20783); sequence-level ratios, GSPO, Zheng et al. 2025
(arXiv:2507.18071); two-sided clipping, INTELLECT-2 2025 (arXiv:2505.07291); KL estimators, Schulman 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# exp() of a log-ratio beyond this is a number no clipped objective can use; it also keeps k3 finite.
MAX_LOG_RATIO = 20.0
STD_EPSILON = 1e-4
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@dataclass(frozen=True)
class Objective:
    """The constants of the loss; see GRPOConfig for their meaning."""

    beta: float = 0.04
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    kl_estimator: str = "k3"
    importance_sampling_level: str = "token"

    @property
    def upper(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class Advantages(NamedTuple):
    """`values` (B,) float32; `dead` (B // G,) bool: groups of equal rewards; `std` (B,) group std of the rewards."""

    values: Tensor
    dead: Tensor
    std: Tensor


class LossTerms(NamedTuple):
    """One micro-batch. `loss` is a scalar with gradient; the rest are (B, T) without, for the metrics."""

    loss: Tensor
    kl: Tensor | None
    ratio: Tensor
    low_clipped: Tensor
    high_clipped: Tensor


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str = "group") -> Advantages:
    """Advantages of B completions in adjacent groups of G.

    Args:
        rewards: (B,) float; NaN marks a completion that no reward applies to.
        num_generations: G; B is a multiple of it.
        scale_rewards: divide by the std of the `group`, of the whole `batch`, or `none`.

    A group whose rewards are all equal gets exactly 0, whatever rounding says: eight times 0.35 has a std of 6e-8, not
    0, and dividing by it would invent advantages. NaN rewards count in no mean and get 0.
    """
    groups = rewards.float().view(-1, num_generations)
    valid = ~groups.isnan()
    count = valid.sum(1, keepdim=True)
    filled = groups.nan_to_num(0.0)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(valid, groups - mean, 0.0)
    high = groups.nan_to_num(-torch.inf).amax(1)
    low = groups.nan_to_num(torch.inf).amin(1)
    dead = (count[:, 0] < 2) | (high == low)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    advantages = torch.where(dead[:, None], 0.0, centred)
    if scale_rewards == "group":
        advantages = advantages / (std + STD_EPSILON)
    elif scale_rewards == "batch":
        present = rewards[~rewards.isnan()].float()
        batch_std = present.std() if present.numel() > 1 else torch.zeros((), device=rewards.device)
        advantages = advantages / (batch_std + STD_EPSILON)
    return Advantages(advantages.flatten(), dead, std.expand_as(groups).flatten())


def token_weights(mask: Tensor, loss_type: str, max_completion_length: int) -> Tensor:
    """Weight of each token's loss, so that the loss of the whole update is a plain sum over tokens.

    Args:
        mask: (B, T) 1 where a token counts; B and T are those of the whole update, before micro-batches are cut.
        loss_type: `grpo` mean over a completion, then over completions; `bnpo` and `dapo` mean over all tokens of the
            update (they differ only between processes); `dr_grpo` sum over tokens / (B * max_completion_length).

    Returns:
        (B, T) float32, 0 where masked. Denominators never vanish: an all-masked update has loss 0.
    """
    mask = mask.float()
    rows = max(mask.shape[0], 1)
    if loss_type == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / rows
    if loss_type in ("bnpo", "dapo"):
        return mask / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return mask / (rows * max_completion_length)
    raise ValueError(f"unknown loss_type {loss_type!r}")


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp whose slope is 1 on a bound and not only between them; a NaN stays one.

    torch's own has slope 1 there before 2.14 and 0 from then on. The first update of a rollout has ratio 1 everywhere,
    so with epsilon 0 (or delta 1) half of its gradient (or all) would depend on the release.
    """
    return torch.where(x > high, high, torch.where(x < low, low, x))


def kl_divergence(logps: Tensor, ref_logps: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (Schulman 2020, "Approximating KL").

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 with d = ref_logp - logp. k1's gradient has expectation zero, so it is a
    metric rather than a loss; k2's gradient is unbiased, k3 is the paper's choice.

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


def grpo_loss(
    logps: Tensor,  # (B, T)
    old_logps: Tensor | None,  # (B, T), or None for the first update of a rollout: the ratio is then exactly 1
    ref_logps: Tensor | None,  # (B, T), or None with beta 0
    advantages: Tensor,  # (B,)
    mask: Tensor,  # (B, T)
    weights: Tensor,  # (B, T) from token_weights
    objective: Objective,
    kl: Tensor | None = None,  # (B, T) exact KL of each token's distribution, with kl_estimator "exact" alone
) -> LossTerms:
    """The clipped GRPO loss of one micro-batch; micro-batches of an update add up to its loss.

    Differentiable in `logps`, and in `kl` where it is given: with kl_estimator "exact" the caller has summed the KL
    over the whole vocabulary, `ref_logps` is not read, and masked positions of `kl` may hold anything.

    Raises:
        ValueError: a KL that does not belong to the estimator, or an exact one that is missing.
    """
    check_kl(objective, ref_logps, kl)
    mask = mask.bool()
    old_logps = logps.detach() if old_logps is None else old_logps
    log_ratio = torch.where(mask, logps - old_logps, 0.0)
    if objective.importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
    ratio = _clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = 1 - objective.epsilon, 1 + objective.upper
    a = advantages[:, None]
    unclipped = ratio if objective.delta is None else _clamp(ratio, -torch.inf, objective.delta)
    token_loss = -torch.minimum(unclipped * a, _clamp(ratio, low, high) * a)
    if kl is not None:
        kl = torch.where(mask, kl, 0.0)
    elif ref_logps is not None:
        kl = kl_divergence(logps, ref_logps, mask, objective.kl_estimator)
    if kl is not None:
        token_loss = token_loss + objective.beta * kl
    loss = torch.where(mask, token_loss * weights, 0.0).sum()
    detached = ratio.detach()
    return LossTerms(
        loss,
        None if kl is None else kl.detach(),
        detached,
        mask & (detached < low) & (a < 0),
        mask & (detached > high) & (a > 0),
    )
