"""The loss of a micro-batch and the sums its metrics are made of, by PyTorch or by one Triton launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_grpo.errors import UserError
from lowvram_grpo.kernels.grpo_loss import fused_grpo_loss
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from lowvram_grpo.kernels.sweep.launch import launch_config
from lowvram_grpo.objective import Objective, grpo_loss
from lowvram_grpo.training.experience import MicroBatch
from lowvram_grpo.training.policy_factor import PolicyFactor
from lowvram_grpo.training.scoring import Scores

_NO_FACTOR = PolicyFactor()


class BonusSums(NamedTuple):
    """Where the loss has an entropy bonus: float32 scalars without gradient.

    Attributes:
        policy_loss: the loss without it, the KL included.
        entropy, tokens: sum and number of the entropies that it acts on.
    """

    policy_loss: Tensor
    entropy: Tensor
    tokens: Tensor


class LossSums(NamedTuple):
    """Of a micro-batch, in float32: scalars over the tokens that count, and (b,) one number a completion. Only `loss`
    has a gradient.

    Attributes:
        kl: None without a reference.
        tokens, low_clipped, high_clipped: (b,) how many count, and of those how many are clipped.
        phi: (b,) vespo's weights, None for all others.
    """

    loss: Tensor
    entropy: Tensor
    kl: Tensor | None
    tokens: Tensor
    low_clipped: Tensor
    high_clipped: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    phi: Tensor | None = None
    bonus: BonusSums | None = None


class KernelChoice(NamedTuple):
    """What computes log-probs and loss, and why, in words for people.

    Attributes:
        path: as in `linear_logps`; None leaves it to the launch decision.
        fused: whether the loss is one Triton launch.
    """

    path: str | None
    fused: bool
    reason: str


def choose_kernels(fused_loss: str, device: torch.device, dtype: torch.dtype, width: int) -> KernelChoice:
    """Settle `fused_loss` (auto, on, off) for hidden states of `width` and `dtype`.

    Raises:
        UserError: `on` where Triton cannot run.
    """
    able = HAS_TRITON and (device.type == "cuda" or interpreted())
    if fused_loss == "off":
        return KernelChoice("torch", False, "PyTorch tiles: fused_loss is off")
    if fused_loss == "on" and not able:
        why = "there is no CUDA GPU" if HAS_TRITON else "Triton is not installed"
        raise UserError(f"fused_loss is on, but {why}; set it to auto, which falls back to PyTorch.")
    if fused_loss == "on" and device.type != "cuda":
        return KernelChoice("fused", True, "Triton's interpreter, for tests")
    launch = launch_config(device, dtype, width)
    names = {"fused": "Triton, matmul included", "cublas": "cuBLAS tiles, folded by Triton", "torch": "PyTorch tiles"}
    return KernelChoice(None, device.type == "cuda" and HAS_TRITON, f"{names[launch.path]}: {launch.reason}")


def micro_loss(
    scores: Scores,
    micro: MicroBatch,
    objective: Objective,
    fused: bool,
    parts: PolicyFactor = _NO_FACTOR,
    entropy_coef: float | None = None,
) -> LossSums:
    """This micro-batch's share of the update's loss.

    Args:
        parts: of `policy_factor`, for these scores.
        entropy_coef: the weight of the entropy bonus; None for a loss without one.
    """
    sums = _loss_sums(scores, micro, objective, fused, parts.factor)._replace(phi=parts.phi)
    return sums if entropy_coef is None else _with_bonus(sums, scores, micro, parts.entropy_mask, entropy_coef)


def _loss_sums(scores: Scores, micro: MicroBatch, objective: Objective, fused: bool, factor: Tensor | None) -> LossSums:
    ref_logps = scores.ref_logps if micro.ref_per_token_logps is None else micro.ref_per_token_logps
    given = (
        scores.logps, micro.old_per_token_logps, ref_logps, micro.advantages, micro.loss_mask, micro.weights, objective,
    )  # fmt: skip
    entropy = scores.entropy.detach()
    if fused:
        out = fused_grpo_loss(*given, kl=scores.kl, factor=factor, entropy=entropy)
        return LossSums(
            out.loss, out.entropy_sum, out.kl_sum, out.tokens, out.low_clipped, out.high_clipped, out.ratio_min,
            out.ratio_max,
        )  # fmt: skip
    terms = grpo_loss(*given, kl=scores.kl, factor=factor)
    mask = micro.loss_mask.bool()
    return LossSums(
        terms.loss,
        (entropy * mask).sum(),
        None if terms.kl is None else (terms.kl * mask).sum(),
        mask.sum(1).float(),
        terms.low_clipped.sum(1).float(),
        terms.high_clipped.sum(1).float(),
        torch.where(mask, terms.ratio, torch.inf).amin(),
        torch.where(mask, terms.ratio, -torch.inf).amax(),
    )


def _with_bonus(
    sums: LossSums, scores: Scores, micro: MicroBatch, entropy_mask: Tensor | None, coef: float
) -> LossSums:
    """L - c H with H the mean entropy of the tokens of the whole update that count, or of those that `entropy_mask`
    leaves: a mean over micro-batches, which is TRL's, would depend on how the update is cut."""
    acted = micro.loss_mask.bool() if entropy_mask is None else entropy_mask
    share = micro.token_share
    # A mask that was made from this very pass says that this micro-batch is the whole update.
    if share is None or (entropy_mask is not None and micro.entropy_mask is None):
        share = 1 / acted.sum().clamp(min=1)
    entropy = torch.where(acted, scores.entropy, 0.0)
    loss = sums.loss - coef * (entropy.sum(1) * share).sum()
    return sums._replace(loss=loss, bonus=BonusSums(sums.loss.detach(), entropy.detach().sum(), acted.sum().float()))
