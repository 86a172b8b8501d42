"""From what a reward function returned, and what it logged, to numbers."""

from __future__ import annotations

import math
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards import guards

# Where an error is raised for what the function did: its own line is the place.
_OURS = (guards.__file__,)
# Of a text that a function made, in a sentence for people.
_SHOWN = 300


class RewardFailure(UserError):
    """A reward function failed; with `reward_errors` none the run goes on."""


class Unanswered(RewardFailure):
    """It took longer than `reward_timeout`, or nobody is there to answer: to ask for less would be of no use."""


def failure(name: str, error: BaseException) -> RewardFailure:
    """One sentence for what the reward function `name` raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in _OURS]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    try:
        said = str(error)
    except Exception:
        said = "an error whose message can't be read"
    return RewardFailure(f"the reward function {name!r} raised {type(error).__name__}: {_cut(said)}{place}.")


def listed(output: Any, n: int, name: str) -> list[Any]:
    """What a function returned as a list of n; a generator runs here.

    Raises:
        RewardFailure: it is no list of rewards, or has another length.
    """
    if hasattr(output, "tolist"):
        output = output.tolist()
    if isinstance(output, (str, bytes, dict, set, frozenset)) or not hasattr(output, "__iter__"):
        raise RewardFailure(
            f"the reward function {name!r} returned {type(output).__name__}, not a list of {n} rewards."
        )
    known = len(output) if hasattr(output, "__len__") else None
    values = list(islice(output, n + 1))  # a generator may never end
    if len(values) != n:
        count = known if known is not None else len(values) if len(values) < n else f"more than {n}"
        raise RewardFailure(
            f"the reward function {name!r} returned {count} rewards for {n} completions; return one for each."
        )
    return values


def number(reward: Any, row: int, name: str) -> float:
    """A reward as a float, NaN for None.

    Raises:
        RewardFailure: it is no finite number.
    """
    if reward is None:
        return math.nan
    try:
        value = math.nan if isinstance(reward, (str, bytes)) else float(reward)
    except Exception:  # of an object's own __float__, too
        value = math.nan
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise RewardFailure(
            f"the reward function {name!r} gave {_shown(reward)} for row {row}; give a finite number, or None where "
            "the reward does not apply."
        )
    return value


def _shown(value: Any) -> str:
    try:
        return _cut(repr(value))
    except Exception:
        return f"a {type(value).__name__}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


class Logs:
    """What one function logs during one call: TRL's `log_extra` and `log_metric`."""

    def __init__(self) -> None:
        self.extras: dict[str, list] = defaultdict(list)
        self.metrics: dict[str, list[float]] = defaultdict(list)

    def extra(self, column: str, values: Sequence) -> None:
        """Append `values` to a column of the completions: one a completion in the end.

        Raises:
            TypeError: a text, whose letters would be taken for values.
        """
        if isinstance(values, (str, bytes)):
            raise TypeError(f"log_extra({column!r}, ...) takes a list of values, one a completion, not a text")
        self.extras[str(column)].extend(values)

    def metric(self, name: str, value: float) -> None:
        """Log a number; several under one name are averaged.

        Raises:
            TypeError, ValueError: it is no number.
        """
        self.metrics[str(name)].append(float(value))

    def check(self, n: int, name: str) -> None:
        """Raises:
        RewardFailure: a column has another number of values than n."""
        for column, values in self.extras.items():
            if len(values) != n:
                raise RewardFailure(
                    f"the reward function {name!r} gave log_extra {len(values)} values of {column!r} for {n} "
                    "completions; give one for each."
                )


def rows_of(logs: Sequence[Logs | None]) -> Logs:
    """One log of calls for a completion each; a column has None where a call failed or did not log it."""
    whole = Logs()
    for column in dict.fromkeys(column for log in logs if log is not None for column in log.extras):
        given = [log.extras.get(column) if log is not None else None for log in logs]
        whole.extras[column] = [values[0] if values else None for values in given]
    for log in logs:
        for name, values in log.metrics.items() if log is not None else ():
            whole.metrics[name] += values
    return whole


def extras_of(named: Iterator[tuple[str, Logs]]) -> dict[str, list]:
    """The columns of all functions; a second one of the same name goes by its function's too."""
    extras: dict[str, list] = {}
    for name, log in named:
        for column, values in log.extras.items():
            extras[column if column not in extras else f"{name}/{column}"] = values
    return extras


def mean_metrics(logs: Sequence[Logs]) -> dict[str, float]:
    """Each metric's mean over all functions, as TRL takes it."""
    values: dict[str, list[float]] = defaultdict(list)
    for log in logs:
        for name, logged in log.metrics.items():
            values[name] += logged
    return {name: sum(logged) / len(logged) for name, logged in values.items()}
