"""Groups that teach nothing, replaced by groups of other prompts before the step learns from them.

A group whose rewards are all equal has advantages of 0. DAPO's dynamic sampling (Yu et al. 2025, arXiv:2503.14476,
section 3.2) samples on until a batch is full of groups that differ. Here the dead groups of a rollout alone are sampled
anew, from other prompts, at most N times; what is dead then stays, so that a step always has its number of groups and
takes a bounded time.

Which prompts come instead is a function of (seed, step) alone: a shuffled order of the whole data, begun anew in each
step, without the prompts that the rollout has. So the order of the epoch is untouched, nothing has to be kept for
--resume, and a prompt that is drawn here comes in its own turn as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from lowvram_grpo.data.streams import is_stream
from lowvram_grpo.errors import UserError, counted
from lowvram_grpo.objective import Advantages
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.training.experience import Rollout
from lowvram_grpo.training.metrics import MetricBook

if TYPE_CHECKING:
    from lowvram_grpo.training.collect import Collector
    from lowvram_grpo.training.curriculum import Curriculum

Rows = list[dict[str, Any]]
# Of the seeds of a step: one for the order of other prompts, then one a round. They lie apart from those of rollouts
# and of epochs, which are small where the run's seed is.
_ROUNDS, _APART = 1_000, 2**62


def round_seed(seed: int, number: int) -> int:
    """Of the `number`-th round (from 1 on) of a rollout with this seed; 0 is the order of prompts that come instead."""
    return (seed * _ROUNDS + number + _APART) % 2**63


def other_prompts(data: Sequence[dict[str, Any]], seed: int, taken: Rows) -> Iterator[dict[str, Any]]:
    """Rows of `data` in a random order, each once, without those whose prompts `taken` has."""
    had = [row["prompt"] for row in taken]
    generator = torch.Generator().manual_seed(round_seed(seed, 0))
    order = torch.randperm(len(data), generator=generator).tolist()
    return (row for row in (data[i] for i in order) if row["prompt"] not in had)


class Resampling:
    """
    Args:
        rounds: how many times dead groups of a rollout are sampled anew, at most.
        data: what other prompts are drawn from.
        sample: rows and a seed to a rollout of theirs and the metrics that its rewards logged.
        advantages: of rewards (B,), rewards of each function (B, F), and G.
        tell: a sentence for people, the first time that it did something.
        seen: hears of every rollout, before groups of it are dropped.
    """

    def __init__(
        self,
        rounds: int,
        data: Sequence[dict[str, Any]],
        sample: Callable[[Rows, int], tuple[Rollout, dict]],
        advantages: Callable[[torch.Tensor, torch.Tensor, int], Advantages],
        tell: Callable[[str], None] = lambda text: None,
        seen: Callable[[Rollout], None] = lambda rollout: None,
    ):
        self.rounds, self.data, self.sample, self.advantages = rounds, data, sample, advantages
        self.tell, self.seen = tell, seen
        self._told = False

    def __call__(
        self, rollout: Rollout, rows: Rows, logged: dict, seed: int
    ) -> tuple[Rollout, Rows, dict, dict[str, float]]:
        """The rollout with its dead groups replaced, as far as `rounds` go; its rows; what was logged, on average over
        all groups that were sampled; and what it cost, as metrics."""
        rows, source, book = list(rows), other_prompts(self.data, seed, rows), MetricBook()
        self._note(book, rollout, logged)
        sampled, drawn, done = rollout.tokens, 0, 0
        dead = int(rollout.advantages.dead.sum())
        while done < self.rounds and rollout.advantages.dead.any():
            places = rollout.advantages.dead.nonzero()[:, 0].tolist()
            fresh = list(islice(source, len(places)))
            if not fresh:
                break
            done += 1
            found, said = self.sample(fresh, round_seed(seed, done))
            self._note(book, found, said)
            drawn, sampled = drawn + len(fresh), sampled + found.tokens
            for place, row in zip(places, fresh):
                rows[place] = row
            rollout = self._with(rollout, found, places[: len(fresh)])
        left = int(rollout.advantages.dead.sum())
        cost = {
            "resample/rounds": done, "resample/groups_drawn": drawn, "resample/dead_before": dead,
            "resample/dead_left": left, "resample/tokens_dropped": sampled - rollout.tokens,
        }  # fmt: skip
        if done and not self._told:
            self._told = True
            self.tell(
                f"{counted(dead, 'dead group')} of {len(rows)} sampled anew in {counted(done, 'round')}: "
                f"{counted(drawn, 'other prompt')}, {counted(sampled - rollout.tokens, 'token')} dropped, {left} still "
                "dead; the metrics resample/* have each step's."
            )
        return rollout, rows, book.fold(), {name: float(value) for name, value in cost.items()}

    def _note(self, book: MetricBook, rollout: Rollout, logged: dict) -> None:
        self.seen(rollout)
        for _ in rollout.advantages.dead:  # each group weighs the same
            book.add(logged)

    def _with(self, rollout: Rollout, found: Rollout, places: list[int]) -> Rollout:
        """`rollout` with the groups of `found` at `places`."""
        groups = len(rollout.advantages.dead)
        size = len(rollout.completions) // groups
        at = {place: i for i, place in enumerate(places)}

        def mixed(old: Sequence, new: Sequence) -> list:
            pick = lambda g: new[at[g] * size : (at[g] + 1) * size] if g in at else old[g * size : (g + 1) * size]
            return [x for g in range(groups) for x in pick(g)]

        stacked = lambda old, new: torch.stack(mixed(list(old), list(new)))
        a, b = rollout.batch, found.batch
        lists = ("prompt_ids", "completion_ids", "sampling_per_token_logps", "truncated")
        batch = RolloutBatch(*(mixed(getattr(a, name), getattr(b, name)) for name in lists))
        if a.tool_mask is not None or b.tool_mask is not None:  # a rollout_func may say it of some only
            batch.tool_mask = mixed(*(of.tool_mask or [[1] * len(ids) for ids in of.completion_ids] for of in (a, b)))
        rewards = stacked(rollout.rewards, found.rewards)
        per_func = stacked(rollout.rewards_per_func, found.rewards_per_func)
        names = {**rollout.extras, **found.extras}
        whole = lambda of: {name: of.extras.get(name, [None] * len(of.completions)) for name in names}
        old, new = whole(rollout), whole(found)
        return replace(
            rollout, batch=batch, prompts=mixed(rollout.prompts, found.prompts),
            completions=mixed(rollout.completions, found.completions), rewards=rewards, rewards_per_func=per_func,
            advantages=self.advantages(rewards, per_func, size),
            extras={name: mixed(old[name], new[name]) for name in names},
            seconds=rollout.seconds + found.seconds,
        )  # fmt: skip


def resampling_of(
    rounds: int,
    data: Sequence[dict[str, Any]],
    sample: Callable[[Rows, int], tuple[Rollout, dict]],
    collector: Collector,
    tell: Callable[[str], None],
    curriculum: Curriculum | None = None,
) -> Resampling | None:
    """None where no round is allowed. A curriculum that measures hears of dropped groups as well: they would be unseen
    to it, come first in every epoch, and be dropped again.

    Raises:
        UserError: the data is a stream.
    """
    if not rounds:
        return None
    if is_stream(data):
        raise UserError(
            f"resample_dead_groups is {rounds}, but the training data is a stream, of which no other prompts can be "
            "drawn; load it whole, or set it to 0."
        )
    seen = {} if curriculum is None else {"seen": curriculum.seen}
    return Resampling(rounds, data, sample, collector.advantages, tell, **seen)
