"""The order of an epoch's prompts by how often they are solved.

    easy_first     the highest pass rate first
    hard_first     the lowest first
    medium_first   the most undecided first: completions that differ are what GRPO learns from, and of a pass rate p the
                   variance of the reward is p (1 - p)

A pass rate comes from a column of the data, `pass_rate` (0 to 1) or `difficulty` (any numbers, the larger the harder;
the median counts as undecided). Without one it is measured as the run goes: the first epoch has its usual order, and
each later one is ordered by the mean reward (medium_first: its standard deviation within the group) that prompts had
when they were last sampled in a step, trained on or dropped; what has not been seen comes first, and what no reward
judged last. Ties keep the epoch's shuffled order. What an epoch
measures is taken up by the next, so that each has every prompt once.

Sources: curriculum learning, Bengio et al. 2009; sampling by difficulty and pass rate in RL of reasoning models,
Kimi k1.5, 2025 (arXiv:2501.12599).
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.streams import is_stream
from lowvram_grpo.errors import UserError, one_line

if TYPE_CHECKING:
    from lowvram_grpo.training.experience import Rollout

ORDERS = ("off", "easy_first", "hard_first", "medium_first")
COLUMNS = ("pass_rate", "difficulty")
_FILE = "curriculum.json"


def _digest(prompt: Any) -> str:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()[:16]


def column_of(names: Sequence[str]) -> str | None:
    """The column of the data that says how hard a prompt is."""
    return next((name for name in COLUMNS if name in names), None)


class Curriculum:
    """
    Args:
        kind: of ORDERS, not `off`.
        data: rows with a `prompt`, and one of COLUMNS where it is known how hard they are.

    Raises:
        UserError: a column whose values are no numbers.
    """

    def __init__(self, kind: str, data: Sequence[dict[str, Any]]):
        self.kind, self.data = kind, data
        self.column = column_of(list(data[0]))
        # (mean, standard deviation) of each prompt's rewards, as it was last sampled; None: nothing judged it.
        self._seen: dict[str, tuple[float, float] | None] = {}
        # What the order of an epoch was made of, for as long as it lasts.
        self._epoch, self._began = 0, {}
        if self.column is not None:
            self._key = self._of_column(self.column)

    @property
    def source(self) -> str:
        """Where pass rates come from, for people."""
        if self.column is not None:
            return f"the column {self.column!r} of the data"
        return "the rewards of this run: the first epoch has its usual order"

    def _of_column(self, name: str) -> list[float]:
        values = [row[name] for row in self.data]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise UserError(
                    f"curriculum {self.kind} orders by the column {name!r}, and it has {one_line(repr(value))}; "
                    "give a number for every prompt, or rename the column to have pass rates measured."
                )
        if name == "pass_rate" and (outside := next((v for v in values if not 0 <= v <= 1), None)) is not None:
            raise UserError(
                f"curriculum {self.kind} orders by the column 'pass_rate', a share from 0 to 1, and it has "
                f"{outside:g}; divide percents by 100, or rename the column to have pass rates measured."
            )
        if self.kind == "medium_first":
            middle = 0.5 if name == "pass_rate" else statistics.median(values)
            return [abs(value - middle) for value in values]
        easy = (name == "pass_rate") == (self.kind == "easy_first")
        return [-value if easy else value for value in values]

    def arrange(self, order: list[int], epoch: int) -> list[int]:
        """`order`, indices of the data as they are shuffled in `epoch` (from 0 on), as the curriculum has them."""
        if self.column is not None:
            return sorted(order, key=self._key.__getitem__)
        if epoch != self._epoch:
            self._epoch, self._began = epoch, dict(self._seen)
        if not self._began:
            return order
        by: Callable[[tuple[float, float]], float] = {
            "easy_first": lambda seen: -seen[0], "hard_first": lambda seen: seen[0], "medium_first": lambda s: -s[1],
        }[self.kind]  # fmt: skip

        def key(digest: str) -> float:
            if digest not in self._began:
                return float("-inf")
            seen = self._began[digest]
            return float("inf") if seen is None else by(seen)

        keys = [key(_digest(row["prompt"])) for row in self.data]
        return sorted(order, key=keys.__getitem__)

    def seen(self, rollout: Rollout) -> None:
        """Take up the rewards of a rollout of a step."""
        groups = len(rollout.advantages.dead)
        size = len(rollout.prompts) // groups
        for g, rewards in enumerate(rollout.rewards.view(groups, size).tolist()):
            known = [reward for reward in rewards if reward == reward]
            judged = (statistics.fmean(known), statistics.pstdev(known)) if known else None
            self._seen[_digest(rollout.prompts[g * size])] = judged

    def save(self, folder: str) -> None:
        if self.column is None:
            state = {"epoch": self._epoch, "began": self._began, "seen": self._seen}
            (Path(folder) / _FILE).write_text(json.dumps(state), encoding="utf-8")

    def restore(self, folder: str) -> None:
        """From a checkpoint of a run that measured pass rates; from another it begins to."""
        path = Path(folder) / _FILE
        if self.column is None and path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            pairs = lambda found: {name: pair and tuple(pair) for name, pair in found.items()}
            self._epoch, self._began, self._seen = state["epoch"], pairs(state["began"]), pairs(state["seen"])


def curriculum_of(kind: str, data: Sequence[dict[str, Any]]) -> Curriculum | None:
    """None where it is off.

    Raises:
        UserError: the data is a stream, or its column does not order it.
    """
    if kind == "off":
        return None
    if is_stream(data):
        raise UserError(
            f"curriculum is {kind}, but the training data is a stream, whose prompts come in its own order; load it "
            "whole, or drop curriculum."
        )
    return Curriculum(kind, data)
