"""What `--resume` asks before it touches a run: is it the same policy, does every setting that a flag changes take
effect, and is anything left to do?

A setting that has changed takes effect from the first step on, unless a rule below says otherwise: `resumable.py` and
`continuation.py` see to it. The rules are of four kinds: refused (another policy, another optimizer's moments, what is
over once a run has begun), refused because another setting outvotes it, without effect and said so, and all others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lowvram_grpo.errors import UserError, flag_of
from lowvram_grpo.training.best_model import stopped_early
from lowvram_grpo.training.continuation import Made, step_of

if TYPE_CHECKING:
    from lowvram_grpo.recipe.resolve import Recipe
    from lowvram_grpo.run.directory import RunDirectory

# A checkpoint holds the weights of an adapter of this shape, on this base.
POLICY = (
    "model",
    "model_revision",
    "quantization",
    "adapter",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "use_peft",
)
# Names of optimizers that keep the same moments; all others go on from their own only. bitsandbytes follows the bits of
# the moments that it finds, so those of 8 bits are not those of 32.
SAME_MOMENTS = (
    ("adamw_torch", "adamw_torch_fused"),
    ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"),
    ("ademamix", "paged_ademamix_32bit"),
    ("ademamix_8bit", "paged_ademamix_8bit"),
    ("lion_32bit", "paged_lion_32bit"),
    ("lion_8bit", "paged_lion_8bit"),
    ("rmsprop_bnb", "rmsprop_bnb_32bit"),
)
# The cold start is over when there is a checkpoint.
COLD_START = ("cold_start", "cold_start_learning_rate", "cold_start_max_steps")
# A setting -> the one that outvotes it where both are set.
OUTVOTED = {
    "num_train_epochs": "max_steps",
    "warmup_ratio": "warmup_steps",
    "gradient_accumulation_steps": "prompts_per_step",
    "vllm_max_model_len": "vllm_max_model_length",
    "vllm_importance_sampling_clip_max": "vllm_importance_sampling_cap",
}
# Without effect on a run that has begun, and why.
IDLE = {
    "preset": "the run keeps its own settings, and a preset only sets what they leave open",
    "memory_plan": "the plan was made when the run was begun",
    "self_test": "it is made before step 1",
    "signal_check": "it is made before step 1",
}
# What decides how many prompts a step has, and so where in the data a step is.
BATCH = (
    "prompts_per_step",
    "num_generations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
    "num_iterations",
)
_APART = ("resume", "output_dir", "plain", "training", "origin", "not_applied", "env")


def changes(begun: Recipe, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Setting -> (value in the run's recipe, value now), for each that differs; those of the training under the default
    of GRPOConfig where they are not set."""
    from lowvram_grpo.recipe.config import GRPOConfig

    default = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(GRPOConfig) if f.init}
    found = {f.name: (getattr(begun, f.name), getattr(recipe, f.name)) for f in fields(recipe) if f.name not in _APART}
    for key in {**begun.training, **recipe.training}:
        found[key] = tuple(side.training.get(key, default.get(key)) for side in (begun, recipe))
    return {key: (old, new) for key, (old, new) in found.items() if old != new}


def check_changes(begun: Recipe, recipe: Recipe, directory: RunDirectory, checkpoint: Path | None) -> list[str]:
    """Whether what differs between `begun`, the recipe in the run's directory, and `recipe` can take effect.

    Returns:
        sentences for people: what changes, and what has no effect.

    Raises:
        UserError: a change that can't take effect, by its flag.
    """
    changed = changes(begun, recipe)
    _check_same_policy(changed, directory)
    if recipe.output_dir and os.path.realpath(recipe.output_dir) != os.path.realpath(directory.path):
        raise UserError(
            f"--output-dir {recipe.output_dir} has no effect beside --resume, which goes on in {directory.path}; drop "
            "it."
        )
    for key, stronger in OUTVOTED.items():
        outvoted = recipe.training.get(stronger)
        counts = bool(outvoted) and (stronger != "max_steps" or outvoted > 0)
        if key in changed and recipe.origin.get(key) == "flag" and stronger not in changed and counts:
            way = "with --max-steps -1 it counts" if stronger == "max_steps" else f"set {flag_of(stronger)} instead"
            raise UserError(f"{flag_of(key)} has no effect beside the run's {stronger} {outvoted}; {way}.")
    if checkpoint is not None:
        _check_begun(changed, directory, checkpoint)
        _check_shape(recipe, directory, checkpoint)
    idle = [f"{flag_of(key)} has no effect on a run that has begun: {IDLE[key]}." for key in IDLE if key in changed]
    told = [f"{key} {_shown(old)} -> {_shown(new)}" for key, (old, new) in changed.items() if key not in IDLE]
    return ([f"changed since the run was begun: {', '.join(told)}."] if told else []) + idle


def _check_same_policy(changed: dict[str, tuple[Any, Any]], directory: RunDirectory) -> None:
    for key in POLICY:
        old, new = changed.get(key, (None, None))
        if old != new and not _moved_away(old):
            raise UserError(
                f"{flag_of(key)} can't change when a run is resumed: {directory.path} was begun with "
                f"{_shown(old)}, not {_shown(new)}; drop the flag, or start a new run without --resume."
            )


def _check_shape(recipe: Recipe, directory: RunDirectory, checkpoint: Path) -> None:
    """Whether a recipe that was edited by hand still has the adapter's numbers; weights fit any alpha."""
    try:
        config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # who loads it says so
    for key, name in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
        if not recipe.adapter and config.get(name, getattr(recipe, key)) != getattr(recipe, key):
            raise UserError(
                f"{key} is {getattr(recipe, key)} in {directory.recipe_path}, but the adapter of {checkpoint} has "
                f"{config[name]}; put that back."
            )


def _check_begun(changed: dict[str, tuple[Any, Any]], directory: RunDirectory, checkpoint: Path) -> None:
    """What can't change any more once there is a checkpoint."""
    made = Made.load(checkpoint)
    moments = (checkpoint / "optimizer.pt").is_file()
    old, new = (str(value) for value in changed.get("optim", ("", "")))
    if made is not None:
        old = str(made.settings.get("optim", old)) if new else ""
    if old != new and moments and not any({old, new} <= set(names) for names in SAME_MOMENTS):
        raise UserError(
            f"--optim can't change from {old} to {new} when a run is resumed: {checkpoint} holds the moments of {old}; "
            f"drop the flag, or start a new run from its weights with --adapter {checkpoint}."
        )
    for key in COLD_START:
        if key in changed:
            raise UserError(
                f"{flag_of(key)} can't change when a run is resumed: the cold start of {directory.path} is over; drop "
                "the flag, or start a new run without --resume."
            )
    old, new = changed.get("beta", (0, 0))
    if not old and new and directory.cold_start_dir.exists() and not any(checkpoint.glob("reference.*")):
        raise UserError(
            f"--beta can't become {new} when {directory.path} is resumed: its reference would be the model after the "
            "cold start, which a run with beta 0 does not keep; drop the flag, or start a new run with --adapter "
            f"{directory.cold_start_dir}."
        )
    if made is None and (batch := [key for key in BATCH if key in changed]):
        raise UserError(
            f"{flag_of(batch[0])} can't change when {checkpoint} is resumed, which an earlier version wrote: it does "
            "not say where in the data the run stands; drop the flag."
        )


def _shown(value: Any) -> str:
    return "none" if value is None else str(getattr(value, "value", value))


def _moved_away(place: Any) -> bool:
    """Whether `place` is a local path with nothing there any more: a flag may then say where it went."""
    return isinstance(place, str) and os.path.isabs(place) and not os.path.exists(place)


def check_unfinished(directory: RunDirectory, checkpoint: Path | None, planned: int, *, patience: int = 0) -> None:
    """Whether there are steps to do, or at least an adapter to leave.

    Args:
        patience: `early_stopping` of today.

    Raises:
        UserError: the run is finished, or would have to go back.
    """
    done, result = step_of(checkpoint), directory.result_dir
    if result is not None and checkpoint is None:
        flag = "--adapter" if result == directory.adapter_dir else "--model"
        raise UserError(
            f"{directory.path} is finished and kept no checkpoint to go on from; start a new run with {flag} {result}."
        )
    if result is not None and done >= planned:
        raise UserError(
            f"{directory.path} is finished ({done} of {planned} steps); pass --max-steps M with M above "
            f"{done} to go on."
        )
    if result is not None and stopped_early(checkpoint, patience):
        raise UserError(
            f"{directory.path} is finished: early_stopping {patience} has ended it at step {done} of {planned}; pass "
            f"--early-stopping M with M above {patience}, or 0, to go on."
        )
    if done > planned:
        raise UserError(
            f"{directory.path} has done {done} steps, more than the {planned} asked for; ask for {done} or more."
        )


class AfterFirstStep(TrainerCallback):
    """Calls `act` once, when the first optimizer step of this process has succeeded and nothing of it is logged yet."""

    def __init__(self, act: Callable[[], None]):
        self.act = act
        self.done = False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.done:
            self.done = True
            self.act()
