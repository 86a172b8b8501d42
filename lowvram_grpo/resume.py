"""What `--resume` asks before it touches a run: is it the same policy, and is anything left to do?"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lowvram_grpo.batching import PromptSampler
from lowvram_grpo.errors import UserError

if TYPE_CHECKING:
    from lowvram_grpo.config import GRPOConfig
    from lowvram_grpo.recipe import Recipe
    from lowvram_grpo.run.directory import RunDirectory

# A checkpoint holds the weights of an adapter of this shape, on this base.
_POLICY = (
    "model",
    "model_revision",
    "quantization",
    "adapter",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
)


def check_same_policy(begun: Recipe, recipe: Recipe, directory: RunDirectory) -> None:
    """Whether `recipe` still trains the policy of `begun`, the recipe in the run's directory.

    Raises:
        UserError: a flag changes it.
    """
    for key in _POLICY:
        old, new = getattr(begun, key), getattr(recipe, key)
        if new != old and not _moved_away(old):
            raise UserError(
                f"--{key.replace('_', '-')} can't change when a run is resumed: {directory.path} was begun with "
                f"{_shown(old)}, not {_shown(new)}; drop the flag, or start a new run without --resume."
            )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _moved_away(place: Any) -> bool:
    """Whether `place` is a local path with nothing there any more: a flag may then say where it went."""
    return isinstance(place, str) and os.path.isabs(place) and not os.path.exists(place)


def check_unfinished(directory: RunDirectory, checkpoint: Path | None, planned: int) -> None:
    """Whether there are steps to do, or at least an adapter to leave.

    Raises:
        UserError: the run is finished.
    """
    if not any(directory.adapter_dir.glob("adapter_model.*")):
        return
    if checkpoint is None:
        raise UserError(
            f"{directory.path} is finished and kept no checkpoint to go on from; start a new run with "
            f"--adapter {directory.adapter_dir}."
        )
    if step_of(checkpoint) >= planned:
        raise UserError(
            f"{directory.path} is finished ({step_of(checkpoint)} of {planned} steps); pass --max-steps M with M above "
            f"{step_of(checkpoint)} to go on."
        )


def step_of(checkpoint: Path | None) -> int:
    """The N of checkpoint-N; 0 without one."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def planned_steps(args: GRPOConfig, data: Sized) -> int:
    """Optimizer steps of the whole run, counted as transformers.Trainer does."""
    if args.max_steps > 0:
        return args.max_steps
    plan = args.batch_plan()
    sampler = PromptSampler(
        data, prompts=plan.prompts_per_rollout, repeats=plan.steps_per_rollout, shuffle=False, seed=0
    )
    return math.ceil(args.num_train_epochs * len(sampler))


class OnceLoaded(TrainerCallback):
    """Calls `act` when training begins: model, adapter, optimizer and scheduler have come out of the checkpoint."""

    def __init__(self, act: Callable[[], None]):
        self.act = act

    def on_train_begin(self, args, state, control, **kwargs):
        self.act()
