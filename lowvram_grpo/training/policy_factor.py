"""What multiplies the policy term of the loss, token by token and without gradient (`objective/factor.py`), as far as a
training configuration asks for any of it: the weights of what another sampler drew, the masks of completions that went
off policy and of tokens of little entropy, and vespo's weight. The KL is not multiplied, as in TRL.

Everything here is a function of a completion's own tokens; the one number that is not, the entropy's threshold, is of
the whole update (`Learner.with_entropy_masks`). So how an update is cut into micro-batches changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lowvram_grpo.objective import (
    CLIPPED,
    Objective,
    high_entropy_mask,
    high_entropy_threshold,
    off_policy_mask,
    vespo_weight,
)
from lowvram_grpo.training.correction import Correction
from lowvram_grpo.training.experience import MicroBatch


class PolicyFactor(NamedTuple):
    """None where nothing asks for it.

    Attributes:
        factor: (b, T) all of it, multiplied.
        phi: (b,) vespo's weights.
        entropy_mask: (b, T) bool, the tokens of most entropy, on which the entropy bonus acts too.
    """

    factor: Tensor | None = None
    phi: Tensor | None = None
    entropy_mask: Tensor | None = None


def policy_factor(
    micro: MicroBatch,
    logps: Tensor,  # (b, T) of the policy now, without gradient
    entropy: Tensor,  # (b, T) likewise
    objective: Objective,
    correction: Correction | None = None,
    other_sampler: bool = False,
) -> PolicyFactor:
    """Of a micro-batch whose tokens the policy has scored.

    Args:
        correction: bounds p / q, where another sampler drew the tokens. p are the log-probs before the first update on
            them: those kept, or where none are kept these very ones. For vespo it is one of tokens.
        other_sampler: the off-policy mask compares with the log-probs of what drew the tokens, not with the old ones.
    """
    before = logps if micro.old_per_token_logps is None else micro.old_per_token_logps
    sampled, advantages, mask = micro.sampling_per_token_logps, micro.advantages, micro.loss_mask
    known = correction is not None and sampled is not None
    ratio = correction.weights(before, sampled, micro.sampled_mask) if known else None
    factor, phi, entropy_mask = ratio, None, None
    if objective.loss_type == "vespo":
        factor = phi = vespo_weight(advantages, logps - before, mask, objective, ratio)
    if objective.off_policy_mask_threshold is not None:
        drawn_by = sampled if other_sampler and sampled is not None else before
        kept = off_policy_mask(advantages, logps, drawn_by, mask, objective.off_policy_mask_threshold)
        factor = kept.float() if factor is None else factor * kept
    if objective.top_entropy_quantile < 1:
        entropy_mask = micro.entropy_mask
        if entropy_mask is None:
            threshold = high_entropy_threshold(entropy, mask, objective.top_entropy_quantile)
            entropy_mask = high_entropy_mask(entropy, mask, threshold)
        factor = entropy_mask.float() if factor is None else factor * entropy_mask
    whole = None if factor is None else factor.expand_as(logps)
    return PolicyFactor(whole, None if phi is None else phi[:, 0], entropy_mask)


def wanted_rows(micro: MicroBatch, objective: Objective, entropy_bonus: bool = False) -> Tensor:
    """(b, T) bool: tokens whose log-prob or entropy can get a gradient, as far as is known before the policy's pass.

    A dead group's policy term has none, whatever the loss type; the KL pulls at every token that counts, and so does
    the entropy bonus. A token of little entropy has none, unless it moves its completion's ratio.
    """
    counted = micro.weights != 0
    if objective.beta:
        return counted
    wanted = counted & (micro.advantages != 0)[:, None]
    if micro.entropy_mask is not None:
        shared_ratio = objective.per_sequence and objective.loss_type in (*CLIPPED, "sapo")
        wanted &= micro.entropy_mask.any(1, keepdim=True) if shared_ratio else micro.entropy_mask
    if entropy_bonus:
        wanted |= counted if micro.entropy_mask is None else micro.entropy_mask
    return wanted
