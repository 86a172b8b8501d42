"""A training job: a recipe and all that it names but for the model's weights. It is read, checked and planned with
before gigabytes are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowvram_grpo.data.encoding import check_prompts, raw_text_notice
from lowvram_grpo.data.load import load
from lowvram_grpo.errors import UserError
from lowvram_grpo.jobs.implied import TRLS_SPLIT, without_evaluation
from lowvram_grpo.jobs.loading import adopt_stored_quantization, read_model_of, training_config
from lowvram_grpo.jobs.resume import check_unfinished
from lowvram_grpo.jobs.task import Rewards, check_reward_columns, prepared, rewards_of, sandbox_notice
from lowvram_grpo.memory.devices import detect
from lowvram_grpo.plan.fitting import fit
from lowvram_grpo.training.cold_start import REFERENCE_COLUMN
from lowvram_grpo.training.continuation import planned_steps
from lowvram_grpo.training.early_checks import check_before_loading, prompt_lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lowvram_grpo.jobs.start import Start
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.recipe.resolve import Recipe


@dataclass(frozen=True)
class Job:
    """What a recipe names. `args` are its settings of the training, with the weights of `rewards`; the data are
    prepared (see `task.prepared`)."""

    recipe: Recipe
    args: GRPOConfig
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    rewards: Rewards
    train_data: Dataset
    eval_data: Dataset | None


def read(recipe: Recipe, tell: Callable[[str], None]) -> Job:
    """Read what `recipe` names; `tell` hears what was decided about the data, and what confines programs.

    Raises:
        UserError: there is no such model, data or reward, or settings that do not fit together.
    """
    model_config, tokenizer = read_model_of(recipe)
    raw = load(recipe.data, config=recipe.data_config, split=recipe.split)
    rewards = rewards_of(recipe, raw.column_names)
    if confined := sandbox_notice(rewards):
        tell(confined)
    evaluated = _evaluated(recipe)
    args = training_config(recipe, weights=rewards.weights)
    train_data, eval_data = _data(recipe, raw, evaluated, tell)
    return Job(recipe, args, model_config, tokenizer, rewards, train_data, eval_data)


def _evaluated(recipe: Recipe) -> Dataset | None:
    """The rows to evaluate on, as they are read. Where only TRL's default names the split, and the data has none, the
    recipe loses its evaluation."""
    if not (recipe.eval_data or recipe.eval_split):
        return None
    try:
        return load(recipe.eval_data or recipe.data, config=recipe.data_config, split=recipe.eval_split)
    except UserError as error:
        if recipe.origin.get("eval_split") != TRLS_SPLIT:
            raise
        without_evaluation(recipe, str(error))
        return None


def _data(
    recipe: Recipe, raw: Dataset, evaluated: Dataset | None, tell: Callable[[str], None]
) -> tuple[Dataset, Dataset | None]:
    """Training data from `raw`, and evaluation data, of which what was said of the training data is not told again."""
    said: list[str] = []
    train_data = prepared(recipe, raw, said.append)
    for sentence in said:
        tell(sentence)
    if evaluated is None:
        return train_data, None
    return train_data, prepared(recipe, evaluated, lambda said_: said_ in said or tell(f"evaluation: {said_}"))


def check(job: Job, start: Start | None, tell: Callable[[str], None]) -> None:
    """All that is cheap to know about a job before a model is loaded.

    Args:
        start: of a resumed run.
        tell: hears that prompts are fed as raw text.

    Raises:
        UserError: nothing is left to do, the chat template is missing or does not fit, the data lack a column that a
            reward asks for, or what `check_before_loading` says.
    """
    args, functions, train_data, eval_data = job.args, job.rewards.functions, job.train_data, job.eval_data
    if start is not None:
        check_unfinished(start.directory, start.checkpoint, planned_steps(args, train_data, start.checkpoint))
    check_prompts(job.tokenizer, train_data, chat_template_kwargs=args.chat_template_kwargs)
    if raw_text := raw_text_notice(job.tokenizer, train_data[:1]["prompt"]):
        tell(raw_text)
    check_reward_columns(job.recipe, functions, train_data)
    if eval_data is not None:
        try:
            check_reward_columns(job.recipe, functions, eval_data)
        except UserError as error:
            raise UserError(f"In the evaluation data: {error}") from error
    check_before_loading(args, functions, eval_data)


def planned(job: Job, tell: Callable[[str], None]) -> Job:
    """The job with what the memory plan makes of its recipe, and without a quantization that the checkpoint has
    already; `tell` hears what was chosen.

    Raises:
        UserError: no configuration fits.
    """
    recipe, args = job.recipe, job.args
    if adopt_stored_quantization(recipe, job.model_config, tell) and args.device.type == "cuda":
        lengths = prompt_lengths(args, job.tokenizer, job.train_data)
        recipe = fit(
            recipe,
            job.model_config,
            detect(args.device.index or 0),
            tell,
            cold_start=str(args.cold_start) == "auto" and REFERENCE_COLUMN in job.train_data.column_names,
            longest_prompt=lengths.longest if lengths.counted == lengths.total and not recipe.eval_data else None,
        )
    return replace(job, recipe=recipe, args=training_config(recipe, weights=job.rewards.weights))
