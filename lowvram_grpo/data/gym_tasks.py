"""Data that reasoning-gym makes: `reasoning-gym:chain_sum?min_terms=2&size=500`, several tasks with + between them.

A spec and an index make an entry, always the same one: rows carry both, so that a scorer can have the entry as the
library made it, and a resumed run has the same data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.errors import UserError, did_you_mean, one_line

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "reasoning-gym:"
#: The column from which `entry_of` makes an entry.
ENTRY_COLUMN = "reasoning_gym_entry"
# Unless they are given. reasoning-gym's own seed is another one each time.
_SIZE, _SEED = 500, 0
# Of a whole mixture, not of one of its tasks.
_OF_ALL = ("size", "seed")


class Task(NamedTuple):
    """A task, its share of a mixture, and its settings."""

    name: str
    weight: float
    settings: dict[str, Any]


def is_gym(place: str | None) -> bool:
    """Whether `--data` names tasks of reasoning-gym."""
    return place is not None and place.strip().lower().startswith(PREFIX)


def load_gym(spec: str) -> Dataset:
    """The tasks of `spec` as a dataset: `question`, `answer`, `task`, and `reasoning_gym_entry` for the scorer.

    Raises:
        UserError: reasoning-gym is not installed, or has no such task or setting.
    """
    from datasets import Dataset

    made = tasks_of(spec)

    def rows() -> Iterator[dict[str, str]]:
        for index in range(len(made)):
            entry = made[index]
            yield {
                "question": str(entry["question"]),
                "answer": str(entry["answer"]),
                "task": str(entry["metadata"].get("source_dataset", spec.strip()[len(PREFIX) :].partition("?")[0])),
                ENTRY_COLUMN: json.dumps([spec.strip(), index]),
            }

    try:
        return Dataset.from_list(list(rows()))
    except Exception as error:  # of a task's own generator
        raise UserError(f"The data {spec} can't be made: {type(error).__name__}: {one_line(error)}.") from error


@lru_cache(maxsize=4096)
def entry_of(written: str) -> tuple[Any, dict[str, Any]]:
    """(the library's dataset, its entry) of a value of `reasoning_gym_entry`.

    Raises:
        UserError: as `load_gym`.
    """
    spec, index = json.loads(written)
    made = tasks_of(spec)
    return made, made[index]


def library(part: str) -> Any:
    """A module of reasoning-gym.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(f"reasoning_gym.{part}")
    except ImportError as error:
        raise UserError(
            f"reasoning-gym can't be imported ({one_line(error)}); install it with `pip install reasoning-gym`."
        ) from error


@lru_cache(maxsize=16)
def tasks_of(spec: str) -> Any:
    """reasoning-gym's own dataset of a spec. Raises as `load_gym`."""
    factory = library("factory")
    library("composite")  # which registers the mixture
    tasks = [_task(part, factory.DATASETS, spec) for part in spec.strip()[len(PREFIX) :].split("+")]
    overall = _overall(tasks, spec)
    try:
        if len(tasks) == 1:
            return factory.create_dataset(tasks[0].name, **tasks[0].settings, **overall)
        parts = [library("composite").DatasetSpec(*task[:2], task.settings) for task in tasks]
        return factory.create_dataset("composite", datasets=parts, **overall)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"The data {spec}: the settings do not fit ({one_line(error)}).") from error


def _task(part: str, known: dict[str, Any], spec: str) -> Task:
    name, _, query = part.strip().partition("?")
    if name not in known or name == "composite":
        few = ", ".join(sorted(known)[:8])
        raise UserError(f"reasoning-gym has no task {name!r}{did_you_mean(name, known)}; some are {few}.")
    settings = dict(_setting(pair, spec) for pair in query.split("&") if pair)
    weight = settings.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
        raise UserError(f"The data {spec}: the weight of {name} is {weight!r}; it must be a positive number.")
    allowed = [field.name for field in fields(known[name][1])]
    for key in settings:
        if key not in allowed:
            raise UserError(
                f"The task {name} of reasoning-gym has no setting {key!r}{did_you_mean(key, allowed)}; it has "
                f"{', '.join(allowed)}."
            )
    return Task(name, float(weight), settings)


def _setting(pair: str, spec: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    if not equals:
        raise UserError(f"The data {spec}: write settings as name=value, with & between them, not {pair!r}.")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, {"True": True, "False": False, "None": None}.get(text, text)


def _overall(tasks: list[Task], spec: str) -> dict[str, int]:
    """Size and seed, taken off the task that they were written behind."""
    found = {"size": _SIZE, "seed": _SEED}
    for key in _OF_ALL:
        given = [task.settings.pop(key) for task in tasks if key in task.settings]
        if len(given) > 1:
            raise UserError(f"The data {spec}: {key} is that of the whole mixture; write it once.")
        if given:
            found[key] = given[0]
            least = 1 if key == "size" else 0
            if isinstance(given[0], bool) or not isinstance(given[0], int) or given[0] < least:
                raise UserError(f"The data {spec}: {key} is {given[0]!r}; it must be a whole number from {least} on.")
    return found
