"""From a recipe to its task: template, rewards, and the data as they want it. For training and evaluation alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowvram_grpo.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from lowvram_grpo.data.load import Preparation
    from lowvram_grpo.recipe.resolve import Recipe
    from lowvram_grpo.rewards.settings import RewardSettings


@dataclass(frozen=True)
class Rewards:
    """What completions are scored with: as `--reward` would say it, as functions (or ids of reward models), and their
    weights where the recipe sets no others."""

    specs: list[str]
    functions: list[Callable | str]
    weights: list[float]


def rewards_of(recipe: Recipe, columns: list[str], *, judged: bool = False) -> Rewards:
    """The rewards of the recipe; one with neither template nor rewards gets a template by the data's columns, or none
    where an environment judges.

    Raises:
        UserError: no reward is named and none follows from the columns, or there is no such reward.
    """
    from lowvram_grpo.rewards.registry import resolve_reward

    alone = judged and not recipe.reward and not recipe.template
    specs = [] if alone else _specs(recipe, columns)
    found = [resolve_reward(spec, _settings(recipe)) for spec in specs]
    return Rewards(specs, [function for function, _ in found], [weight for _, weight in found])


def _settings(recipe: Recipe) -> RewardSettings:
    """The recipe's own, with the run's longest completion where no length is set."""
    from lowvram_grpo.recipe.config import GRPOConfig

    longest = recipe.training.get("max_completion_length") or GRPOConfig.max_completion_length
    return replace(recipe, max_completion_len=recipe.max_completion_len or longest)


def sandbox_notice(rewards: Rewards) -> str:
    """What confines the programs that a reward runs, in a sentence; empty where none does."""
    from lowvram_grpo.rewards import sandbox
    from lowvram_grpo.rewards.code import runs_programs

    return f"programs run in a sandbox: {sandbox.describe()}." if any(map(runs_programs, rewards.functions)) else ""


def _specs(recipe: Recipe, columns: list[str]) -> list[str]:
    from lowvram_grpo.data.gym_tasks import is_gym
    from lowvram_grpo.data.templates import guess
    from lowvram_grpo.rewards.registry import TEMPLATE_REWARDS

    if recipe.places and all(map(is_gym, recipe.places)) and not recipe.reward:
        if not recipe.template and recipe.system_prompt is None:  # something must ask for the answer's tags
            recipe.template, recipe.origin["template"] = "r1", "reasoning-gym"
        return ["reasoning_gym"]
    if not recipe.template and not recipe.reward:
        recipe.template = guess(columns)
        recipe.origin["template"] = "guessed from the columns"
    specs = recipe.reward or TEMPLATE_REWARDS.get(recipe.template, [])
    if not specs:
        raise UserError(
            "No reward given; pass --reward with a built-in name or path/to/file.py:function, or a --template."
        )
    return specs


def guess_notice(recipe: Recipe) -> str:
    """A sentence for people where `rewards_of` has guessed a template, else an empty string."""
    from lowvram_grpo.rewards.registry import TEMPLATE_REWARDS

    if recipe.origin.get("template") == "reasoning-gym":
        return "the tasks of reasoning-gym are asked with template r1 and scored by its own scorers."
    if not recipe.origin.get("template", "").startswith("guessed"):
        return ""
    return (
        f"neither --template nor --reward given: by its columns the data is for template {recipe.template}, "
        f"with rewards {', '.join(TEMPLATE_REWARDS[recipe.template])}."
    )


def prepared(recipe: Recipe, dataset: Dataset, tell: Callable[[str], None] = lambda sentence: None) -> Dataset:
    """`dataset` with the prompts and answers that the recipe makes of it; `tell` hears what was decided.

    Raises:
        UserError: as `data.prepare`, or an unreadable few-shot file.
    """
    return preparing(recipe, dataset, tell).of(dataset)


def preparing(recipe: Recipe, dataset: Dataset, tell: Callable[[str], None]) -> Preparation:
    """What `prepared` does to rows like those of `dataset`."""
    from lowvram_grpo.data.few_shot import few_shot
    from lowvram_grpo.data.load import preparation

    answers, shots = _read_by_builtins(recipe, dataset), few_shot(recipe.few_shot)
    return preparation(
        dataset,
        template=recipe.template,
        prompt_column=recipe.prompt_column,
        answer_column=recipe.answer_column,
        system_prompt=recipe.system_prompt,
        few_shot=shots,
        answer_columns=answers,
        tell=tell,
    )


def _read_by_builtins(recipe: Recipe, dataset: Dataset) -> list[str]:
    """Columns of answers that are no text or number, where a built-in reward compares with them and no template says
    what they are. A person's own rewards get such columns as they are."""
    from datasets import Value

    from lowvram_grpo.rewards.registry import COMPARING, parse_spec

    if recipe.template or not COMPARING & {parse_spec(spec).target for spec in recipe.reward}:
        return []
    found = next((name for name in ("answer", "solution") if name in dataset.column_names), None)
    return [] if found is None or type(dataset.features[found]) is Value else [found]


def check_reward_columns(recipe: Recipe, rewards: list[Callable | str], data: Dataset) -> None:
    """Whether the data has the columns that the rewards ask for.

    Raises:
        UserError: it lacks one.
    """
    from lowvram_grpo.rewards.signatures import check_columns
    from lowvram_grpo.training.collect import reward_columns

    only_prompts = bool(recipe.training.get("remove_unused_columns"))
    columns = reward_columns(data.column_names, only_prompts=only_prompts)
    check_columns(rewards, [*columns, *(["environments"] if recipe.environment else [])])
