"""What multiplies a token's policy term and carries no gradient: masks, and vespo's weight. The KL is left alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram_grpo.objective.loss import MAX_LOG_RATIO, Objective, by_condition

# The smallest log of an importance weight, that of VESPO's reference implementation.
_MIN_LOG_WEIGHT = math.log(1e-8)


def off_policy_mask(advantages: Tensor, logps: Tensor, sampled: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """(B, 1) bool, False for completions of negative advantage that the policy has moved away from:

        M_i = 0  where  A_i < 0  and  1/|o_i| sum_t (log pi_sampled - log pi)_it > threshold

    Args:
        advantages: (B,) or (B, 1).
        logps, sampled: (B, T) log-probs of the policy now, and of what drew the tokens. A NaN among those, which is a
            token that it could not score, is no evidence.
        mask: (B, T) 1 where a token counts.

    Source: off-policy sequence masking, DeepSeek-V3.2 2025 (arXiv:2512.02556) eq. 9.
    """
    mask = mask.bool()
    gap = torch.where(mask, sampled - logps.detach(), 0.0).nan_to_num(nan=0.0)
    mean = gap.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (advantages.view(-1, 1) >= 0) | (mean <= threshold)


def high_entropy_threshold(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """Scalar: the entropy from which on a token is among the `share` of those in `mask` (any shape) that have most,
    interpolated between two of them; NaN without a token.

    Source: forking tokens, "Beyond the 80/20 Rule", Wang et al. 2025 (arXiv:2506.01939); `share` is its rho.
    """
    counted = torch.where(mask.bool(), entropy.detach().float(), torch.nan)
    return counted.flatten().nanquantile(1 - share)


def high_entropy_mask(entropy: Tensor, mask: Tensor, threshold: Tensor) -> Tensor:
    """bool, of their shape: the tokens of `mask` whose entropy is at least `threshold`."""
    return mask.bool() & (entropy.detach().float() >= threshold)


@torch.no_grad()
def vespo_weight(
    advantages: Tensor,  # (B,) or (B, 1)
    log_ratio: Tensor,  # (B, T) logp - old_logp
    mask: Tensor,  # (B, T)
    objective: Objective,
    sampler_ratio: Tensor | None = None,  # (B, T) bounded p / q of each token, or (B, 1) of each completion
) -> Tensor:
    """(B, 1) vespo's phi, a Gamma-shaped weight of the whole completion's importance weight W, 1 at W = 1:

        W    = prod_t pi / pi_old  (times prod_t pi_old / pi_sampler where another sampler drew the tokens)
        phi  = exp(lambda) W^k exp(-lambda W)      k, lambda: those of the advantage's sign

    A log-ratio of a token is cut at +-20, that of the completion at log(1e-8) and 20. Masked tokens count for nothing.

    Source: VESPO, 2026 (arXiv:2602.10693), normalized to phi(1) = 1.
    """
    log_weight = torch.where(mask.bool(), log_ratio, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).sum(1, keepdim=True)
    if sampler_ratio is not None:
        correction = sampler_ratio.log().clamp(_MIN_LOG_WEIGHT, MAX_LOG_RATIO)
        if sampler_ratio.shape[1] != 1 or mask.shape[1] == 1:
            correction = torch.where(mask.bool(), correction, 0.0)
        log_weight = log_weight + correction.sum(1, keepdim=True)
    log_weight = log_weight.clamp(_MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    positive = advantages.view(-1, 1) >= 0
    by_sign = lambda of_positive, of_negative: by_condition(positive, of_positive, of_negative, log_weight)
    k = by_sign(objective.vespo_k_pos, objective.vespo_k_neg)
    rate = by_sign(objective.vespo_lambda_pos, objective.vespo_lambda_neg).clamp(min=1e-4)
    return (rate + k * log_weight - rate * log_weight.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
