"""The GRPO objective as pure tensor functions: the single definition of the maths.

Everything works on padded (B, T) tensors of per-token log-probs; no model, no device, no state. Kernels that fuse parts
of it are held against these pages.

    A_i   = (r_i - mean(r_group)) / std(r_group)                                 advantages.py
    w_it  = 1 / denominator of the loss type, 0 where masked                     weights.py
    f_it  = what leaves tokens out or weighs them, without gradient              factor.py
    rho   = exp(logp - old_logp)
    L     = sum_it w_it * [ f_it * policy(rho, A) + beta * KL_it ]               loss.py

Sources: GRPO, Shao et al. 2024 (arXiv:2402.03300) eq. 3-4; every other is named where its equation stands.
"""

from lowvram_grpo.objective.advantages import STD_EPSILON, Advantages, decoupled_advantages, group_advantages
from lowvram_grpo.objective.factor import high_entropy_mask, high_entropy_threshold, off_policy_mask, vespo_weight
from lowvram_grpo.objective.loss import (
    CLIPPED,
    LOSS_TYPES,
    MAX_LOG_RATIO,
    LossTerms,
    Objective,
    check_factor,
    check_kl,
    grpo_loss,
    kl_divergence,
)
from lowvram_grpo.objective.weights import OF_ROLLOUT, token_weights

__all__ = [
    "CLIPPED",
    "LOSS_TYPES",
    "MAX_LOG_RATIO",
    "OF_ROLLOUT",
    "STD_EPSILON",
    "Advantages",
    "LossTerms",
    "Objective",
    "check_factor",
    "check_kl",
    "decoupled_advantages",
    "group_advantages",
    "grpo_loss",
    "high_entropy_mask",
    "high_entropy_threshold",
    "kl_divergence",
    "off_policy_mask",
    "token_weights",
    "vespo_weight",
]
