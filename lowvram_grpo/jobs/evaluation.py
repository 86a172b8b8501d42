"""Prompts of a dataset sampled and scored: a value a prompt for every metric, and means over prompts with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lowvram_grpo.errors import UserError, counted

if TYPE_CHECKING:
    from datasets import Dataset

    from lowvram_grpo.rollout.sampler import Sampling
    from lowvram_grpo.training.collect import Collector
    from lowvram_grpo.training.experience import Rollout

_Z = 1.959964  # 97.5 % of a normal distribution lie below


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The probability that at least one of k completions passes, k drawn without replacement from `samples` of which
    `passed` do: the unbiased estimate of Chen et al. 2021 (arXiv:2107.03374, eq. 1)."""
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def check_ks(ks: Sequence[int], samples: int) -> None:
    """Whether pass@k can be estimated for each of `ks` from so many samples a prompt.

    Raises:
        UserError: it cannot.
    """
    for k in ks:
        if not 1 <= k <= samples:
            raise UserError(
                f"pass@{k} can't be estimated from {counted(samples, 'sample')} a prompt; --k takes numbers from 1 to "
                "--samples."
            )


class Interval(NamedTuple):
    """A mean over `prompts` values, one a prompt, and its 95 % confidence interval by the normal approximation (none
    for fewer than two)."""

    mean: float
    low: float | None
    high: float | None
    prompts: int

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """Of (P,) values; NaN (does not apply) counts in nothing."""
        present = values[~values.isnan()].double()
        n = len(present)
        if n < 2:
            return cls(float(present.mean()) if n else math.nan, None, None, n)
        mean, half = float(present.mean()), _Z * float(present.std()) / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)

    @property
    def half(self) -> float | None:
        """Half of the interval's width: what stands behind the plus-minus sign."""
        return None if self.high is None else self.high - self.mean


@dataclass
class Scored:
    """G completions of each of P prompts, scored by F reward functions.

    Attributes:
        names: of the functions.
        rewards: (P, G) float32 weighted sums, NaN where no function applies.
        per_func: (P, G, F) float32, NaN for "does not apply".
        truncated: (P, G) bool, the length limit ended the completion.
        lengths: (P, G) tokens.
        seconds: of sampling and scoring.
    """

    names: list[str]
    rewards: Tensor
    per_func: Tensor
    truncated: Tensor
    lengths: Tensor
    seconds: float

    def per_prompt(self, ks: Sequence[int], threshold: float) -> dict[str, Tensor]:
        """Metric -> (P,) values, NaN where a metric does not apply to the prompt.

        `reward`, `rewards/NAME`, `pass@K`, `truncated` and `length`; with G above 1 also `reward_std` (within the
        group) and `frac_reward_zero_std` (1 for a group whose rewards are all equal: GRPO learns nothing from it).

        Args:
            ks: of pass@k, each at most G.
            threshold: a completion passes whose total reward is at least this.
        """
        found = {"reward": self.rewards.nanmean(1)}
        for i, name in enumerate(self.names):
            found[f"rewards/{name}"] = self.per_func[:, :, i].nanmean(1)
        found |= self._passes(ks, threshold)
        if self.rewards.shape[1] > 1:
            found |= self._spread()
        found["truncated"] = self.truncated.float().mean(1)
        found["length"] = self.lengths.float().mean(1)
        return found

    def _passes(self, ks: Sequence[int], threshold: float) -> dict[str, Tensor]:
        # Weights such as 0.1 have no exact sum.
        passed = (self.rewards >= threshold - 1e-6 * max(1.0, abs(threshold))).sum(1).tolist()
        none_applies, group = self.rewards.isnan().all(1), self.rewards.shape[1]
        found = {}
        for k in ks:
            values = torch.tensor([pass_at_k(group, c, k) for c in passed])
            found[f"pass@{k}"] = values.masked_fill(none_applies, torch.nan)
        return found

    def _spread(self) -> dict[str, Tensor]:
        """As group_advantages has it: a group of which fewer than two completions have a reward is dead."""
        present = ~self.rewards.isnan()
        count = present.sum(1)
        centred = torch.where(present, self.rewards - self.rewards.nanmean(1, keepdim=True), 0.0)
        std = (centred.square().sum(1) / (count - 1).clamp(min=1)).sqrt()
        high = self.rewards.nan_to_num(-torch.inf).amax(1)
        low = self.rewards.nan_to_num(torch.inf).amin(1)
        dead = (count < 2) | (high == low)
        return {
            "reward_std": std.masked_fill(count < 2, torch.nan).masked_fill((count > 1) & dead, 0.0),
            "frac_reward_zero_std": dead.float(),
        }

    def summary(self, ks: Sequence[int], threshold: float) -> dict[str, Interval]:
        """Metric -> mean over prompts."""
        return {name: Interval.of(values) for name, values in self.per_prompt(ks, threshold).items()}

    def minus(self, base: Scored, ks: Sequence[int], threshold: float) -> dict[str, Interval]:
        """Metric -> mean of the paired differences, prompt by prompt, to the same prompts of another model."""
        ours, theirs = (scored.per_prompt(ks, threshold) for scored in (self, base))
        return {name: Interval.of(ours[name] - theirs[name]) for name in ours}


def default_threshold(weights: Sequence[float], full: Sequence[float]) -> float:
    """The total reward of a completion to which every function of positive weight gives full marks: right for rewards
    that are all or nothing.

    Args:
        weights, full: one a function; see `registry.full_marks`.

    Raises:
        UserError: no weight is positive.
    """
    total = sum(weight * marks for weight, marks in zip(weights, full) if weight > 0)
    if not total:
        raise UserError("No reward has a positive weight, so there is no usual threshold; pass --threshold.")
    return total


def all_or_nothing(scored: Scored, full: Sequence[float]) -> bool:
    """Whether every reward function gave nothing but 0 and full marks."""
    values = scored.per_func
    return bool((values.isnan() | (values == 0) | (values == torch.tensor(full))).all())


def evaluate(
    collector: Collector,
    data: Dataset,
    group: int,
    *,
    sampling: Sampling,
    seed: int,
    completions_a_call: int,
    seen: Callable[[int, Rollout], None],
) -> Scored:
    """Sample `group` completions of each prompt and score them.

    Args:
        data: prepared; see `task.prepared`.
        completions_a_call: how many the engine is asked for at once, rounded to whole groups, one at least. What is
            drawn depends on (seed, this, the data's order), not on the engine's waves.
        seen: called after each call with the index of its first prompt and what was sampled.

    Raises:
        UserError: a reward function failed, or memory ran out for good.
    """
    started, parts = perf_counter(), []
    for first, last in _spans(len(data), max(1, completions_a_call // group)):
        rollout, _ = collector.collect(
            [data[i] for i in range(first, last)],
            group,
            seed=(seed * 1_000_003 + first) % 2**63,
            trainer_state=None,
            sampling=sampling,
        )
        parts.append(_of(rollout, group))
        seen(first, rollout)
    rewards, per_func, truncated, lengths = (torch.cat(column) for column in zip(*parts))
    return Scored(collector.rewards.names, rewards, per_func, truncated, lengths, perf_counter() - started)


def _spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, total)) for first in range(0, total, step))


def _of(rollout: Rollout, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards (p, G), per_func (p, G, F), truncated (p, G), lengths (p, G) on the host."""
    per_func = rollout.rewards_per_func.cpu()
    return (
        rollout.rewards.cpu().view(-1, group),
        per_func.view(-1, group, per_func.shape[1]),
        torch.tensor(rollout.batch.truncated).view(-1, group),
        torch.tensor([len(ids) for ids in rollout.batch.completion_ids]).view(-1, group),
    )


def completion_rows(rollout: Rollout, names: Sequence[str], first: int, group: int) -> list[dict[str, Any]]:
    """One row a completion, for completions.jsonl."""
    from lowvram_grpo.run.completions import as_text

    per_func, rewards = rollout.rewards_per_func.tolist(), rollout.rewards.tolist()
    return [
        {
            "prompt_index": first + i // group,
            "prompt": as_text(rollout.prompts[i]),
            "completion": as_text(rollout.completions[i]),
            "rewards": dict(zip(names, per_func[i])),
            "reward": rewards[i],
            "tokens": len(rollout.batch.completion_ids[i]),
            "truncated": rollout.batch.truncated[i],
        }
        for i in range(len(rewards))
    ]
