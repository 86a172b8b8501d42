"""What a training configuration makes of the loss: its constants, and the weights of what another sampler drew."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from lowvram_grpo.objective import Objective
from lowvram_grpo.training.correction import Correction

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig


def objective_of(args: GRPOConfig) -> Objective:
    """The constants of the loss, which have the names of the fields."""
    return Objective(**{f.name: getattr(args, f.name) for f in fields(Objective)})


def other_sampler(args: GRPOConfig) -> bool:
    """Whether what draws the tokens is not the policy as it is scored: another engine, or a cache that rounds."""
    return bool(args.use_vllm) or args.kv_cache_dtype == "int8"


def correction_of(args: GRPOConfig) -> Correction | None:
    """What a training configuration asks for; None where the sampler is the policy itself."""
    if not args.use_vllm:
        return Correction() if args.kv_cache_dtype == "int8" else None
    if not args.vllm_importance_sampling_correction:
        return None
    return Correction(
        args.vllm_importance_sampling_mode,
        args.vllm_importance_sampling_clip_min,
        args.vllm_importance_sampling_clip_max,
    )
