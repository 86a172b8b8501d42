"""What a recipe trains and evaluates on: one dataset or a mixture, whole or as a stream, prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_grpo.data.mixture import (
    Mixture,
    Part,
    check_weights,
    mixed,
    read_mixture,
    said_of_first,
    share_of,
    shared_out,
)
from lowvram_grpo.data.reading import load, load_stream
from lowvram_grpo.errors import UserError
from lowvram_grpo.jobs.implied import TRLS_SPLIT, without_evaluation
from lowvram_grpo.jobs.task import check_reward_columns, preparing
from lowvram_grpo.recipe.resolve import Recipe

if TYPE_CHECKING:
    from lowvram_grpo.jobs.task import Rewards


@dataclass(frozen=True)
class Raw:
    """The datasets that a recipe names, as they were read."""

    parts: list[Part]
    mixture: Mixture | None = None

    @property
    def columns(self) -> list[str]:
        """Those that all of them have."""
        first, *others = [part.first.column_names for part in self.parts]
        return [name for name in first if all(name in names for names in others)]


def read_raw(recipe: Recipe, tell: Callable[[str], None]) -> Raw:
    """Read what `recipe` trains on.

    Raises:
        UserError: it can't be read, or settings contradict each other.
    """
    if recipe.dataset_mixture:
        return _read_mixture(recipe, tell)
    places = recipe.places
    if recipe.data_weights:
        check_weights(recipe.data_weights, places)
    if recipe.data_config and len(places) > 1:
        raise UserError(
            "data_config names a configuration of one dataset, and there are several; write a dataset_mixture into a "
            "recipe, whose datasets have a `config` each."
        )
    names = _names(places)
    return Raw([_read(name, place, recipe, recipe.split) for name, place in zip(names, places)])


def _read_mixture(recipe: Recipe, tell: Callable[[str], None]) -> Raw:
    mixture = read_mixture(recipe.dataset_mixture or {})
    if recipe.data_weights:
        raise UserError("data_weights is for several --data, and dataset_mixture has weights of its own; drop one.")
    if recipe.stream and (mixture.test is not None or any(source.share is not None for source in mixture.sources)):
        raise UserError(
            "weight and test_split_size of dataset_mixture are shares of rows, whose number nobody knows of a stream; "
            "drop them or stream (several --data with --data-weights can be streamed)."
        )
    if recipe.data:
        tell("dataset_mixture is what is trained on; dataset_name (data) is left out, as in Open R1.")
    parts = []
    names = _names([f"{source.place}:{source.config}" if source.config else source.place for source in mixture.sources])
    for name, source in zip(names, mixture.sources):
        if recipe.stream:
            part = load_stream(source.place, config=source.config, split=source.split)
            if source.columns:
                part = Part(
                    name,
                    part.data.select_columns(list(source.columns)),
                    part.first.select_columns(list(source.columns)),
                )
            parts.append(Part(name, part.data, part.first))
        else:
            data = load(source.place, config=source.config, split=source.split)
            data = share_of(data, source, mixture.seed)
            parts.append(Part(name, data, data))
    return Raw(parts, mixture)


def _read(name: str, place: str, recipe: Recipe, split: str | None) -> Part:
    if recipe.stream:
        part = load_stream(place, config=recipe.data_config, split=split)
        return Part(name, part.data, part.first)
    data = load(place, config=recipe.data_config, split=split)
    return Part(name, data, data)


def _names(places: Sequence[str]) -> list[str]:
    """Short ones, all different."""
    short = [Path(place).stem if Path(place).exists() else place for place in places]
    if len({*short}) == len(short):
        return short
    short = ["/".join(Path(place).parts[-2:]) if Path(place).exists() else place for place in places]
    return short if len({*short}) == len(short) else [f"{name} ({i})" for i, name in enumerate(short, 1)]


def read_evaluated(recipe: Recipe) -> list[Part] | None:
    """What `recipe` evaluates on, as it is read. Where only TRL's default names the split, and the data has none, the
    recipe loses its evaluation.

    Raises:
        UserError: it can't be read.
    """
    if not (recipe.eval_data or recipe.eval_split):
        return None
    try:
        if recipe.dataset_mixture and not recipe.eval_data:
            raise UserError(
                "dataset_mixture has no other split to evaluate on; set its test_split_size, or pass --eval-data."
            )
        places = [recipe.eval_data] if recipe.eval_data else recipe.places
        return [_read(name, place, recipe, recipe.eval_split) for name, place in zip(_names(places), places)]
    except UserError as error:
        if recipe.origin.get("eval_split") != TRLS_SPLIT:
            raise
        without_evaluation(recipe, str(error))
        return None


def prepared_data(
    recipe: Recipe, raw: Raw, held_out: Sequence[Part] | None, rewards: Rewards, tell: Callable[[str], None]
) -> tuple[Part, Part | None]:
    """Training data, and evaluation data, of which what was said of the training data is not told again.

    Raises:
        UserError: as `data.prepare`, or a part lacks a column that a reward asks for.
    """
    seed = raw.mixture.seed if raw.mixture else recipe.training.get("seed") or 0
    said: list[str] = []
    train = mixed(_prepared(recipe, raw.parts, rewards, said.append), recipe.data_weights, seed, said.append)
    for sentence in said:
        tell(sentence)
    evaluated = None
    if raw.mixture:
        if not recipe.stream:
            train, evaluated = shared_out(train, seed, raw.mixture.test)
        if evaluated and held_out is not None:
            raise UserError("test_split_size of dataset_mixture keeps rows for evaluation; drop it, or the eval data.")
    if held_out is not None:
        told = lambda sentence: sentence in said or tell(f"evaluation: {sentence}")
        try:
            parts = _prepared(recipe, held_out, rewards, told)
        except UserError as error:
            raise UserError(f"In the evaluation data: {error}") from error
        evaluated = mixed(parts, None, seed, told)
    return train, evaluated


def _prepared(recipe: Recipe, parts: Sequence[Part], rewards: Rewards, tell: Callable[[str], None]) -> list[Part]:
    found = []
    for part in parts:
        where = lambda sentence, part=part: tell(f"{part.name}: {sentence}" if len(parts) > 1 else sentence)
        try:
            how = preparing(recipe, part.first, said_of_first(part, where))
            first = how.of(part.first)
            check_reward_columns(recipe, rewards.functions, first)
        except UserError as error:
            if len(parts) == 1:
                raise
            raise UserError(f"In {part.name}: {error}") from error
        found.append(Part(part.name, how.of_stream(part.data) if part.streams else first, first))
    return found
