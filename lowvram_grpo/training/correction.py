"""Importance weights for completions that were not drawn from the policy as the trainer computes it.

Another inference engine, other weights' rounding or a coarser KV cache draw from q where the trainer scores p. The
expectation over p is that over q times p / q, and the quotient is bounded so that no single token runs away with the
gradient ("truncated importance sampling"). It is a function of the sampled tokens alone: a sequence is never compared
with others, so how an update is cut into micro-batches does not change it.

Sources: truncated importance sampling for RL with a separate sampler, Yao et al. 2025, "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training"; the four modes and their bounds are those of TRL's
`vllm_importance_sampling_mode`; truncation itself, Ionides 2008.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram_grpo.objective import MAX_LOG_RATIO


@dataclass(frozen=True)
class Correction:
    """How a quotient becomes a weight.

    Attributes:
        mode: one of `recipe.config.CORRECTION_MODES`. The quotient is a token's, or the product over its whole
            completion; outside the bounds it is set to the bound it has passed (`truncate`), or to 0 (`mask`).
        low, high: the bounds; None for none.
    """

    mode: str = "token_truncate"
    low: float | None = None
    high: float | None = 3.0

    @property
    def per_sequence(self) -> bool:
        return self.mode.startswith("sequence")

    def weights(self, scored: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
        """(b, T) float32 without gradient, times which the policy term of the loss is taken; the KL is not.

        Args:
            scored: (b, T) log-probs of the policy before the first update on them.
            sampled: (b, T) log-probs that the sampler gave its tokens.
            mask: (b, T) 1 where a token was sampled; elsewhere both may hold anything, and a token's weight is 1.
        """
        quotient = quotients(scored, sampled, mask, per_sequence=self.per_sequence)
        if self.mode.endswith("truncate"):
            return quotient if self.low is self.high is None else quotient.clamp(self.low, self.high)
        kept = torch.ones_like(quotient, dtype=torch.bool)
        if self.low is not None:
            kept &= quotient >= self.low
        if self.high is not None:
            kept &= quotient <= self.high
        # Compared so that a NaN, which is a broken log-prob, stays one: it must not be masked away in silence.
        return torch.where(kept | quotient.isnan(), quotient, 0.0)


def quotients(scored: Tensor, sampled: Tensor, mask: Tensor, *, per_sequence: bool = False) -> Tensor:
    """(b, T) float32 exp(scored - sampled), of each token or of the whole completion; log-quotients beyond
    +-MAX_LOG_RATIO are cut there, and masked tokens have 1 (count for nothing in their completion)."""
    gap = torch.where(mask.bool(), (scored.detach() - sampled).float(), 0.0)
    if per_sequence:
        gap = gap.sum(1, keepdim=True).expand_as(gap)
    return gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
