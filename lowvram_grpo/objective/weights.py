"""Denominators: what a token's loss is divided by, fixed for a whole update before it is cut."""

from __future__ import annotations

from torch import Tensor

# Loss types that are divided by the tokens of the whole rollout.
OF_ROLLOUT = ("dapo", "cispo", "vespo")


def token_weights(
    mask: Tensor, loss_type: str, max_completion_length: int, share_of_rollout: Tensor | None = None
) -> Tensor:
    """Weight of each token's loss, so that the loss of the whole update is a plain sum over tokens.

        grpo, sapo            1 / (B |o_i|)       mean over a completion, then over completions
        luspo                 1 / B               sum over a completion, mean over completions: times |o_i| beside grpo
        dr_grpo               1 / (B L_max)       L_max = max_completion_length
        bnpo                  1 / sum_i |o_i|     mean over the tokens of the update
        dapo, cispo, vespo    1 / N               N: tokens of the rollout, the share that falls to one update

    Where a rollout serves one step, N is sum_i |o_i|, and dapo is bnpo. Otherwise a token weighs the same in each of
    its steps, whatever the lengths of the completions that it is there with.

    Args:
        mask: (B, T) 1 where a token counts; B and T are those of the whole update, before micro-batches are cut.
        share_of_rollout: scalar N for dapo, cispo and vespo; the tokens of `mask` if left out.

    Returns:
        (B, T) float32, 0 where masked. Denominators never vanish: an all-masked update has loss 0.

    Sources: GRPO (arXiv:2402.03300); LUSPO, Liu et al. 2026 (arXiv:2602.05261); dr_grpo, Liu et al. 2025
    (arXiv:2503.20783); DAPO, Yu et al. 2025 (arXiv:2503.14476); that of a whole rollout is TRL's.
    """
    mask = mask.float()
    rows = max(mask.shape[0], 1)
    if loss_type in ("grpo", "sapo"):
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / rows
    if loss_type == "luspo":
        return mask / rows
    if loss_type == "dr_grpo":
        return mask / (rows * max_completion_length)
    if loss_type in ("bnpo", *OF_ROLLOUT):
        whole = share_of_rollout if loss_type in OF_ROLLOUT else None
        return mask / (mask.sum() if whole is None else whole.float()).clamp(min=1)
    raise ValueError(f"unknown loss_type {loss_type!r}")
