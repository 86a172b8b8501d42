"""Settings that follow from others: the LoRA settings and the base of a given adapter, and when to evaluate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_grpo.errors import UserError
from lowvram_grpo.plan.paper import OF_THE_ADAPTER
from lowvram_grpo.policy.adapter import adapter_config
from lowvram_grpo.recipe.not_applied import NotApplied
from lowvram_grpo.run.directory import RunDirectory

if TYPE_CHECKING:
    from lowvram_grpo.recipe.resolve import Recipe

# Who set eval_strategy, in the written recipe.
IMPLIED = "implied by the evaluation data"
# Who set eval_split where only TRL's default did.
TRLS_SPLIT = "TRL's default"
_EVAL_STEPS = 50
_BASE = ("quantization", "head_dtype")


def imply(recipe: Recipe, tell: Callable[[str], None]) -> None:
    """Write into `recipe` what its adapter and its evaluation data imply. Raises as `adopt_adapter` and
    `imply_evaluation`."""
    if recipe.adapter:
        adopt_adapter(recipe, tell)
    imply_evaluation(recipe)


def imply_evaluation(recipe: Recipe) -> None:
    """Whoever names evaluation data wants it used: every `eval_steps` steps, with each checkpoint when unset (every
    logged step, transformers' default, would spend most of the run on it). A file of TRL's or Open R1's that evaluates
    means the split `test` unless it names another.

    Raises:
        UserError: an evaluation is asked for that has no data.
    """
    training = recipe.training
    by_file = recipe.origin.get("eval_strategy") == "file" and training["eval_strategy"] != "no"
    kept = (recipe.dataset_mixture or {}).get("test_split_size")
    if by_file and not (recipe.eval_data or recipe.eval_split or kept):
        recipe.eval_split, recipe.origin["eval_split"] = "test", TRLS_SPLIT
    if not (recipe.eval_data or recipe.eval_split or kept):
        if training.get("eval_strategy", "no") != "no":
            raise UserError(
                f"eval_strategy is {training['eval_strategy']}, but there is no data to evaluate on; pass --eval-data "
                "or --eval-split, or drop eval_strategy."
            )
        if training.get("eval_on_start"):
            raise UserError(
                "eval_on_start is set, but there is no data to evaluate on; pass --eval-data or --eval-split, or drop "
                "eval_on_start."
            )
        if training.get("early_stopping"):
            raise UserError(
                "early_stopping is set, but there is no data to evaluate on; pass --eval-data or --eval-split, or drop "
                "early_stopping."
            )
        return
    if "eval_strategy" not in training:
        training["eval_strategy"] = "steps"
        recipe.origin["eval_strategy"] = IMPLIED
    if training["eval_strategy"] == "steps" and not training.get("eval_steps"):
        training["eval_steps"] = training.get("save_steps") or _EVAL_STEPS
        recipe.origin["eval_steps"] = IMPLIED
    _imply_best_model(recipe)


def _imply_best_model(recipe: Recipe) -> None:
    """A run that ends when it gets no better leaves the best weights; and where these are asked for, a checkpoint is
    due with each evaluation, unless somebody has said when."""
    training, said = recipe.training, ("flag", "file")
    evaluated = training["eval_strategy"]
    keeps_none = training.get("save_strategy") == "no" or evaluated == "no"
    if training.get("early_stopping") and "load_best_model_at_end" not in training and not keeps_none:
        training["load_best_model_at_end"] = True
        recipe.origin["load_best_model_at_end"] = IMPLIED
        if recipe.resume:  # whose file says everything
            said = ("flag",)
    if not training.get("load_best_model_at_end"):
        return
    due = {"save_strategy": evaluated}
    if evaluated == "steps" and training.get("save_strategy", "steps") == "steps":
        due["save_steps"] = training["eval_steps"]
    for key, value in due.items():
        if recipe.origin.get(key) not in said and training.get(key) != value:
            training[key], recipe.origin[key] = value, IMPLIED


def without_evaluation(recipe: Recipe, why: str) -> None:
    """Take out of the recipe an evaluation on a split that its data has not; `why` is what was found instead."""
    keys = [key for key in ("eval_strategy", "eval_steps", "eval_on_start", "do_eval") if key in recipe.training]
    for key in keys:
        del recipe.training[key]
        recipe.origin.pop(key, None)
    recipe.eval_split = None
    del recipe.origin["eval_split"]
    recipe.not_applied.append(NotApplied(tuple(keys), f"nothing is evaluated: {why.rstrip('.')}"))


def adopt_adapter(recipe: Recipe, tell: Callable[[str], None]) -> None:
    """Check the adapter to start from, and write its LoRA settings into the recipe: they are what is trained. An
    adapter that one of our runs left goes on on the base that it has learned on, which `tell` hears of where that is
    not the preset's.

    Raises:
        UserError: there is no such adapter, or a LoRA setting contradicts it.
    """
    config = adapter_config(recipe.adapter)
    modules = config.target_modules
    theirs = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": modules if isinstance(modules, str) else sorted(modules or []),
        "lora_modules_to_save": list(config.modules_to_save) if config.modules_to_save else None,
        "use_rslora": bool(config.use_rslora),
        "use_dora": bool(config.use_dora),
    }
    for key, value in theirs.items():
        asked = getattr(recipe, key)
        # A run of an earlier version wrote the defaults down.
        if recipe.origin.get(key) in ("flag", "file") and not recipe.resume and asked != value:
            raise UserError(
                f"{key} is {asked}, but the adapter {recipe.adapter} has {value}, which can't be changed; drop {key}, "
                "or drop --adapter to train a fresh one."
            )
        setattr(recipe, key, value)
        recipe.origin[key] = "adapter"
    if not recipe.resume and (said := _adopt_base(recipe)):
        tell(f"the base as {recipe.adapter} was trained on it: {', '.join(said)}.")


def _adopt_base(recipe: Recipe) -> list[str]:
    """What is changed by it: a memory plan may have kept that run's base in something else than its preset says."""
    from lowvram_grpo.recipe.resolve import resolve

    file = RunDirectory(Path(recipe.adapter).resolve().parent).recipe_path
    if not (Path(recipe.adapter).is_dir() and file.is_file()):
        return []
    try:
        theirs = resolve({}, file)
    except UserError:  # some other program's
        return []
    changed = []
    for key in _BASE if theirs.model == recipe.model else ():
        ours, settings = (
            {"quantization": side.quantization, "head_dtype": side.training.get("head_dtype", "dense")}
            for side in (recipe, theirs)
        )
        if recipe.origin.get(key) in ("flag", "file") or ours[key] == settings[key]:
            continue
        if key == "quantization":
            recipe.quantization = settings[key]
        else:
            recipe.training[key] = settings[key]
        recipe.origin[key] = OF_THE_ADAPTER
        changed.append(f"{key} {settings[key]}")
    return changed
