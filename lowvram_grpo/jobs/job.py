"""A training job: a recipe and all that it names but for the model's weights. It is read, checked and planned with
before gigabytes are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.encoding import check_prompts, raw_text_notice
from lowvram_grpo.data.mixture import Part
from lowvram_grpo.jobs.loading import adopt_stored_quantization, read_model_of, training_config
from lowvram_grpo.jobs.resume import check_unfinished
from lowvram_grpo.jobs.task import Rewards, rewards_of, sandbox_notice
from lowvram_grpo.jobs.tool_files import Acting, acting_of
from lowvram_grpo.jobs.training_data import prepared_data, read_evaluated, read_raw
from lowvram_grpo.memory.devices import detect
from lowvram_grpo.plan.fitting import fit
from lowvram_grpo.training.cold_start import REFERENCE_COLUMN
from lowvram_grpo.training.continuation import planned_steps
from lowvram_grpo.training.early_checks import check_before_loading, prompt_lengths
from lowvram_grpo.training.parts import check_agents, with_schemas
from lowvram_grpo.training.streaming import check_steps

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lowvram_grpo.jobs.start import Start
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.recipe.resolve import Recipe


@dataclass(frozen=True)
class Job:
    """What a recipe names. `args` are its settings of the training, with the weights of `rewards`; the data are
    prepared (see `training_data`)."""

    recipe: Recipe
    args: GRPOConfig
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    rewards: Rewards
    train: Part
    evaluation: Part | None
    acting: Acting

    @property
    def told(self) -> GRPOConfig:
        """`args` with what prompts tell the model of tools, by which prompts are rendered and counted."""
        return with_schemas(self.acting.agents, self.args)

    @property
    def train_data(self) -> Any:
        """A Dataset, or a stream."""
        return self.train.data

    @property
    def eval_data(self) -> Any:
        return None if self.evaluation is None else self.evaluation.data


def read(recipe: Recipe, tell: Callable[[str], None]) -> Job:
    """Read what `recipe` names; `tell` hears what was decided about the data, and what confines programs.

    Raises:
        UserError: there is no such model, data or reward, or settings that do not fit together.
    """
    model_config, tokenizer = read_model_of(recipe)
    raw = read_raw(recipe, tell)
    acting = acting_of(recipe)
    rewards = rewards_of(recipe, raw.columns, judged=acting.judges)
    if confined := sandbox_notice(rewards):
        tell(confined)
    evaluated = read_evaluated(recipe)
    args = training_config(recipe, weights=rewards.weights)
    check_steps(args, raw.parts[0].data)
    train, evaluation = prepared_data(recipe, raw, evaluated, rewards, tell)
    return Job(recipe, args, model_config, tokenizer, rewards, train, evaluation, acting)


def check(job: Job, start: Start | None, tell: Callable[[str], None]) -> None:
    """All that is cheap to know about a job before a model is loaded.

    Args:
        start: of a resumed run.
        tell: hears that prompts are fed as raw text.

    Raises:
        UserError: nothing is left to do, the chat template is missing or does not fit, the data lack a column that a
            reward asks for, or what `check_before_loading` says.
    """
    args, first = job.args, job.train.first
    if start is not None:
        planned = planned_steps(args, first, start.checkpoint)
        check_unfinished(start.directory, start.checkpoint, planned, patience=args.early_stopping)
    check_prompts(job.tokenizer, first, chat_template_kwargs=args.chat_template_kwargs)
    check_agents(job.acting.agents, args, job.tokenizer, first)
    if raw_text := raw_text_notice(job.tokenizer, first[:1]["prompt"]):
        tell(raw_text)
    check_before_loading(args, job.rewards.functions, job.eval_data)


def planned(job: Job, tell: Callable[[str], None]) -> Job:
    """The job with what the memory plan makes of its recipe, and without a quantization that the checkpoint has
    already; `tell` hears what was chosen.

    Raises:
        UserError: no configuration fits.
    """
    recipe, args = job.recipe, job.args
    if adopt_stored_quantization(recipe, job.model_config, tell) and args.device.type == "cuda":
        lengths = prompt_lengths(job.told, job.tokenizer, job.train.first, whole=not job.train.streams)
        # What an environment says goes behind a prompt: as far as it may, where there is a bound.
        known = not recipe.eval_data and not (recipe.environment and args.max_prompt_length)
        recipe = fit(
            recipe,
            job.model_config,
            detect(args.device.index or 0),
            tell,
            cold_start=str(args.cold_start) == "auto" and REFERENCE_COLUMN in job.train.first.column_names,
            longest_prompt=lengths.longest if lengths.counted == lengths.total and known else None,
        )
    return replace(job, recipe=recipe, args=training_config(recipe, weights=job.rewards.weights))
