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
from lowvram_grpo.training.scoring import Scores


class LossSums(NamedTuple):
    """Float32 scalars over the tokens that count; only `loss` has a gradient. `kl` is None without a reference."""

    loss: Tensor
    tokens: Tensor
    entropy: Tensor
    kl: Tensor | None
    low_clipped: Tensor
    high_clipped: Tensor
    ratio_min: Tensor
    ratio_max: Tensor


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


def wanted_rows(micro: MicroBatch, objective: Objective) -> Tensor:
    """(b, T) bool: tokens whose log-prob can get a gradient. A dead group's cannot, unless the KL pulls at it."""
    wanted = micro.weights != 0
    return wanted if objective.beta else wanted & (micro.advantages != 0)[:, None]


def micro_loss(scores: Scores, micro: MicroBatch, objective: Objective, fused: bool) -> LossSums:
    """This micro-batch's share of the update's loss."""
    ref_logps = scores.ref_logps if micro.ref_per_token_logps is None else micro.ref_per_token_logps
    given = (
        scores.logps, micro.old_per_token_logps, ref_logps, micro.advantages, micro.loss_mask, micro.weights, objective,
    )  # fmt: skip
    if fused:
        out = fused_grpo_loss(*given, kl=scores.kl, entropy=scores.entropy)
        return LossSums(
            out.loss, out.tokens, out.entropy_sum, out.kl_sum, out.low_clipped, out.high_clipped, out.ratio_min,
            out.ratio_max,
        )  # fmt: skip
    terms = grpo_loss(*given, kl=scores.kl)
    mask = micro.loss_mask.bool()
    total = lambda values: (values * mask).sum()
    return LossSums(
        terms.loss,
        mask.sum().float(),
        total(scores.entropy),
        None if terms.kl is None else total(terms.kl),
        total(terms.low_clipped).float(),
        total(terms.high_clipped).float(),
        torch.where(mask, terms.ratio, torch.inf).amin(),
        torch.where(mask, terms.ratio, -torch.inf).amax(),
    )
