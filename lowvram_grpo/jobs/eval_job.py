"""An evaluation before its model is loaded: what is asked of it, and all that its recipe names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.encoding import check_prompts
from lowvram_grpo.data.load import load
from lowvram_grpo.errors import UserError, flag_of
from lowvram_grpo.jobs.evaluation import check_ks, default_threshold
from lowvram_grpo.jobs.inference import check_filters, recipe_to_sample
from lowvram_grpo.jobs.loading import check_device, read_model_of, training_config
from lowvram_grpo.jobs.task import Rewards, check_reward_columns, guess_notice, prepared, rewards_of, sandbox_notice
from lowvram_grpo.rewards.registry import full_marks
from lowvram_grpo.training.early_checks import check_lengths, prompt_lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.recipe.resolve import Recipe

_SPLITS = ("test", "validation", "valid", "dev", "train")
_USUAL_KS = (1, 4, 8)


@dataclass(frozen=True)
class Wanted:
    """What is asked of an evaluation, beside its recipe.

    Attributes:
        samples: completions a prompt of the sampled pass; 0 leaves it out.
        threshold: of a pass; None: as `evaluation.default_threshold`.
        filters: of the sampled pass: temperature, top_p, top_k, min_p and repetition_penalty (of both).
        ks: of pass@k.
        out: folder for every completion and the numbers; None: none is written.
    """

    greedy: bool
    samples: int
    ks: tuple[int, ...]
    threshold: float | None
    limit: int | None
    compare_base: bool
    filters: dict[str, Any]
    out: Path | None

    @classmethod
    def checked(cls, *, k: str | None, **rest: Any) -> Wanted:
        """With `k` as it was written (`1,4,8`; None: those of 1, 4 and 8 that `samples` allows).

        Raises:
            UserError: numbers that can't be, or nothing to do.
        """
        samples, limit, out = rest["samples"], rest["limit"], rest["out"]
        if samples < 0 or not (samples or rest["greedy"]):
            raise UserError(f"--samples is {samples}; give 1 or more, or 0 with --greedy for the greedy pass alone.")
        if limit is not None and limit < 1:
            raise UserError(f"--limit is {limit}; it must be 1 or more.")
        try:
            ks = tuple(sorted({int(part) for part in k.split(",")})) if k else None
        except ValueError as error:
            raise UserError(f"--k is {k!r}; write numbers with commas, as in --k 1,4,8.") from error
        if ks:
            check_ks(ks, samples)
        check_filters(rest["filters"], None)
        if samples and not rest["filters"]["temperature"]:
            raise UserError(
                "--temperature is 0, at which all samples are the same; give one above 0, or --samples 0 for the "
                "greedy pass alone."
            )
        if out and (out / "eval.json").exists():
            raise UserError(f"{out} holds an evaluation already; choose another --out.")
        return cls(ks=ks or tuple(k for k in _USUAL_KS if k <= samples), **rest)


@dataclass(frozen=True)
class EvalJob:
    """What an evaluation samples and scores.

    Attributes:
        data: prepared; see `task.prepared`.
        place: what the data are called.
        full: full marks, one a reward function.
        threshold: the total reward from which a completion passes.
    """

    recipe: Recipe
    args: GRPOConfig
    tokenizer: PreTrainedTokenizerBase
    rewards: Rewards
    data: Dataset
    place: str
    full: list[float]
    threshold: float


def read(flags: dict[str, Any], wanted: Wanted, tell: Callable[[str], None]) -> EvalJob:
    """Resolve the recipe of a run, or of `flags` alone, and read what it names, and check what is cheap to check.

    Args:
        flags: the recipe's settings that were given.
        tell: hears what was chosen and what is cut.

    Raises:
        UserError: whatever a person can mend.
    """
    recipe = _recipe(flags, tell)
    check_device(recipe)
    if wanted.compare_base and not recipe.adapter:
        given = flags.get("adapter")
        instead = f"{given} is a whole model: evaluate its base with --model" if given else "pass --adapter"
        raise UserError(f"--compare-base compares an adapter with its base; {instead}.")
    raw, place = _data(recipe, flags)
    rewards = rewards_of(recipe, raw.column_names)
    for sentence in filter(None, (guess_notice(recipe), sandbox_notice(rewards))):
        tell(sentence)
    model_config, tokenizer = read_model_of(recipe)
    args = training_config(recipe, weights=rewards.weights)
    if wanted.limit:
        raw = raw.select(range(min(wanted.limit, len(raw))))
    data = prepared(recipe, raw, tell)
    check_reward_columns(recipe, rewards.functions, data)
    check_prompts(tokenizer, data, chat_template_kwargs=args.chat_template_kwargs)
    check_lengths(args, prompt_lengths(args, tokenizer, data), model_config, tell, spelled=flag_of)
    full = [full_marks(function) for function in rewards.functions]
    threshold = default_threshold(args.reward_weights, full) if wanted.threshold is None else wanted.threshold
    return EvalJob(recipe, args, tokenizer, rewards, data, place, full, threshold)


def _recipe(flags: dict[str, Any], tell: Callable[[str], None]) -> Recipe:
    """Rewards that are named now are not the run's, whose weights do not belong to them."""
    recipe = recipe_to_sample(flags, tell)
    if {"reward", "template"} & flags.keys() and "reward_weights" not in flags:
        recipe.training.pop("reward_weights", None)
    if "template" in flags and "reward" not in flags:
        recipe.reward = []
    return recipe


def _data(recipe: Recipe, flags: dict[str, Any]) -> tuple[Dataset, str]:
    """The data that was named, else the run's evaluation data, else the run's data; and what it is called.

    Raises:
        UserError: there is none, or it can't be read.
    """
    if "data" in flags:
        place, split, config = recipe.data, flags.get("split"), flags.get("data_config")
    else:
        place, split, config = recipe.eval_data or recipe.data, recipe.eval_split, recipe.data_config
        split = flags.get("split") or split
    if isinstance(place, list) or (not place and recipe.dataset_mixture):
        raise UserError(f"The run was trained on {', '.join(recipe.places)}; name the one to evaluate on with --data.")
    if not place:
        raise UserError("No data given; pass --data with a folder, a json/jsonl/csv/parquet file or a hub id.")
    data = load(place, config=config, split=split, prefer=_SPLITS)
    named = split or (str(data.split) if data.split else None)
    return data, f"{place}, split {named}" if named else place
