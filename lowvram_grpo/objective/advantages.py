"""From rewards to advantages: what a completion is compared with, and what the difference is divided by.

    sum_then_normalize    r_i = sum_k c_k r_ik,    A_i = (r_i - mean(r_group)) / std     group_advantages
    normalize_then_sum    z_i = sum_k c_k (r_ik - mean(r_k,group)) / std(r_k,group),
                          A_i = (z_i - mean(z_batch)) / std(z_batch)                     decoupled_advantages

Sources: GRPO, Shao et al. 2024 (arXiv:2402.03300) eq. 3; std of the batch, "Tricks or Traps?", Liu et al. 2025
(arXiv:2508.08221); no std, Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783); normalize_then_sum, GDPO, 2026
(arXiv:2601.05242).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STD_EPSILON = 1e-4


class Advantages(NamedTuple):
    """`values` (B,) float32; `dead` (B // G,) bool: groups that differ in nothing; `std` (B,) group std."""

    values: Tensor
    dead: Tensor
    std: Tensor


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str = "group") -> Advantages:
    """Advantages of B completions in adjacent groups of G.

    Args:
        rewards: (B,) float; NaN marks a completion that no reward applies to.
        num_generations: G; B is a multiple of it.
        scale_rewards: divide by the std of the `group`, of the whole `batch`, or `none`.

    A group whose rewards are all equal gets exactly 0, whatever rounding says: eight times 0.35 has a std of 6e-8, not
    0, and dividing by it would invent advantages. NaN rewards count in no mean and get 0.
    """
    centred, dead, std = _within_groups(rewards[:, None], num_generations)
    centred, dead, std = centred[:, 0], dead[:, 0], std[:, 0]
    if scale_rewards == "group":
        centred = centred / (std + STD_EPSILON)
    elif scale_rewards == "batch":
        centred = centred / (_std(rewards) + STD_EPSILON)
    return Advantages(centred, dead, std)


def decoupled_advantages(per_func: Tensor, reward_weights: Tensor, num_generations: int) -> Advantages:
    """GDPO: each reward is normalized within its groups before they are added, so that one of small spread is heard
    beside one of large; their sum is normalized over the whole batch (arXiv:2601.05242).

    Args:
        per_func: (B, F) float, a column a reward function; NaN where one does not apply.
        reward_weights: (F,).
        num_generations: G; B is a multiple of it.

    A completion that no reward applies to counts in no mean and gets 0, as does a group in which no reward differs.
    """
    centred, dead, std = _within_groups(per_func, num_generations)
    scored = ~per_func.isnan()
    total = (centred / (std + STD_EPSILON) * reward_weights.float()).sum(1)
    unscorable = ~scored.any(1)
    total = total.masked_fill(unscorable, torch.nan)
    values = ((total - total.nanmean()) / (_std(total) + STD_EPSILON)).nan_to_num(0.0)
    dead = dead.all(1)
    values = torch.where(dead.repeat_interleave(num_generations), 0.0, values)
    weighed = (per_func.float() * reward_weights.float()).nansum(1).masked_fill(unscorable, torch.nan)
    return Advantages(values, dead, _within_groups(weighed[:, None], num_generations)[2][:, 0])


def _within_groups(rewards: Tensor, num_generations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of rewards (B, F): their distance from the group's mean (B, F), 0 for NaN and in dead groups; dead (B // G, F);
    the group's std (B, F)."""
    groups = rewards.float().unflatten(0, (-1, num_generations))
    valid = ~groups.isnan()
    count = valid.sum(1, keepdim=True)
    mean = groups.nan_to_num(0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(valid, groups - mean, 0.0)
    high = groups.nan_to_num(-torch.inf).amax(1)
    low = groups.nan_to_num(torch.inf).amin(1)
    dead = (count[:, 0] < 2) | (high == low)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(dead[:, None], 0.0, centred).flatten(0, 1), dead, std.expand_as(groups).flatten(0, 1)


def _std(values: Tensor) -> Tensor:
    """Of those that are not NaN; 0 for fewer than two."""
    present = values[~values.isnan()].float()
    return present.std() if present.numel() > 1 else torch.zeros((), device=values.device)
