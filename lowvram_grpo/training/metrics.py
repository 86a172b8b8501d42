"""Metrics between two log lines: everything that was added under a name is averaged when it is taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowvram_grpo.training.correction import Correction, quotients
from lowvram_grpo.training.experience import Rollout
from lowvram_grpo.training.loss import LossSums
from lowvram_grpo.training.scoring import Scores


def read(groups: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Scalars on one device as numbers, by one copy that waits for the device once."""
    values = [value for group in groups for value in group.values()]
    numbers = iter(torch.stack([value.detach().float() for value in values]).tolist() if values else ())
    return [{name: next(numbers) for name in group} for group in groups]


class MetricBook:
    """Values by name. Minima and maxima (names ending in min or max) are folded as such; the rest are averaged.

    Attributes:
        values: since they were last taken.
        last: what was taken then.
    """

    def __init__(self):
        self.values: dict[str, list[float]] = defaultdict(list)
        self.last: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self.values)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.values[name].append(float(value))

    def add_update(self, update: UpdateSums) -> dict[str, float]:
        """Add what an update has summed up, and return its means: here the host waits for the device. A loss of a
        subclass's own may have summed up nothing."""
        if not update:
            return {}
        means = update.take()
        for gap in update.gaps:
            self.add(gap)
        self.add(means)
        return means

    def take(self) -> dict[str, float]:
        """All metrics since the last call, and forget them. NaN (not applicable) counts in no mean."""
        folded = {}
        for name, values in self.values.items():
            present = [v for v in values if v == v] or [float("nan")]
            kind = name.rsplit("/", 1)[-1].rsplit("_", 1)[-1]
            folded[name] = {"min": min, "max": max}.get(kind, lambda v: sum(v) / len(v))(present)
        self.values.clear()
        self.last = folded or self.last
        return folded


def complete_row(
    row: dict[str, float], books: Mapping[str, MetricBook], *, eval_prefix: str, tokens: int, device: torch.device
) -> None:
    """Add to a row of transformers' log what was measured since the last of its kind.

    Args:
        books: `train` and `eval`.
        eval_prefix: `eval`, or `eval_NAME` for one of several datasets.
        tokens: seen by the model since the run began.
    """
    if any(key.startswith("eval_") for key in row):
        row.update({f"{eval_prefix}_{name}": value for name, value in books["eval"].take().items()})
    elif "loss" in row or ("train_runtime" in row and books["train"]):
        # As in TRL, the last row has what was measured since the last logged step.
        row.update(books["train"].take())
        row["num_tokens"] = tokens
        memory = peak_memory_gib(device)
        if memory is not None:
            row["memory/peak_gib"] = memory


def rollout_metrics(rollout: Rollout, names: list[str]) -> dict[str, float]:
    """Lengths and rewards of a rollout, with the names of its reward functions."""
    lengths = [len(ids) for ids in rollout.batch.completion_ids]
    rewards = reward_metrics(rollout.rewards, rollout.rewards_per_func, names, rollout.advantages.dead)
    return {**length_metrics(lengths, rollout.batch.truncated), **rewards}


def length_metrics(lengths: list[int], truncated: list[bool]) -> dict[str, float]:
    """Completion lengths in tokens, before any masking; `terminated` are those that ended by themselves (0 if none)."""
    ended = [n for n, cut in zip(lengths, truncated) if not cut] or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(truncated) / len(truncated),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
    }


def reward_metrics(rewards: Tensor, per_func: Tensor, names: list[str], dead: Tensor) -> dict[str, float]:
    """rewards (B,), per_func (B, F), dead (groups,); NaN entries count in no mean."""

    def std(x: Tensor) -> float:
        x = x[~x.isnan()]
        return float(x.std()) if x.numel() > 1 else 0.0

    found = {
        "reward": float(rewards.nanmean()),
        "reward_std": std(rewards),
        "frac_reward_zero_std": float(dead.float().mean()),
    }
    for name, column in zip(names, per_func.T):
        found[f"rewards/{name}/mean"] = float(column.nanmean())
        found[f"rewards/{name}/std"] = std(column)
    return found


class UpdateSums:
    """Sums over the micro-batches of one update, divided once at its end; until then they stay on the device, and
    nobody waits for it.

    Attributes:
        gaps: of the micro-batches that had one; numbers once `take` has been called.
    """

    def __init__(self):
        self.gaps: list[dict[str, Tensor]] | list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._extremes: list[dict[str, Tensor]] = []
        self._rows = self._diffuse = 0

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, sums: LossSums, scores: Scores, gap: dict[str, Tensor] | None = None) -> None:
        """A micro-batch's; `gap` is its `sampler_metrics`, where it is the first update on these tokens."""
        values = {
            "tokens": sums.tokens,
            "entropy": sums.entropy,
            "clip_ratio/low_mean": sums.low_clipped,
            "clip_ratio/high_mean": sums.high_clipped,
            "clip_ratio/region_mean": sums.low_clipped + sums.high_clipped,
        }
        if sums.kl is not None:
            values["kl"] = sums.kl
        for name, total in values.items():
            total = total.detach()
            self._sums[name] = total if name not in self._sums else self._sums[name] + total
        tokens = sums.tokens.clamp(min=1)
        extremes = {"clip_ratio/low_min": sums.low_clipped / tokens, "clip_ratio/high_max": sums.high_clipped / tokens}
        extremes |= {"ratio/min": sums.ratio_min, "ratio/max": sums.ratio_max}
        if scores.diffuse is not None:
            self._rows += scores.rows
            self._diffuse += scores.diffuse
            if scores.bound is not None:
                extremes["sweep/direction_bound_max"] = scores.bound
        self._extremes.append(extremes)
        if gap is not None:
            self.gaps.append(gap)

    def take(self) -> dict[str, float]:
        """The update's metrics: the one moment at which the host waits for its forward and backward passes."""
        tokens = self._sums.pop("tokens").clamp(min=1)
        means = {name: total / tokens for name, total in self._sums.items()}
        found, *rest = read([means, *self._extremes, *self.gaps])
        extremes, self.gaps = rest[: len(self._extremes)], rest[len(self._extremes) :]
        for name in dict.fromkeys(name for micro in extremes for name in micro):
            values = [micro[name] for micro in extremes if name in micro]
            found[name] = (min if name.endswith("min") else max)(values)
        if not found["ratio/min"] <= found["ratio/max"]:  # no token counted
            del found["ratio/min"], found["ratio/max"]
        if self._rows:
            found["sweep/diffuse_ratio"] = self._diffuse / self._rows
        return found


def sampler_metrics(
    scored: Tensor, sampled: Tensor, mask: Tensor, correction: Correction | None = None
) -> dict[str, Tensor]:
    """How far the trainer's log-probs (b, T) are from the sampler's, before the first update on them: scalars on their
    device, NaN where no token was sampled.

    With a correction the ratios under TRL's name are those that were applied, as there, and the quotients themselves
    stand beside them."""
    mask = mask.bool()
    _, mean, highest = _spread((scored - sampled).abs(), mask)
    found = {"sampling/sampling_logp_difference/mean": mean, "sampling/sampling_logp_difference/max": highest}
    raw = quotients(scored, sampled, mask)
    if correction is None:
        return found | _named("sampling/importance_sampling_ratio", raw, mask)
    applied = correction.weights(scored, sampled, mask)
    if correction.per_sequence:
        # A completion without a token has no weight.
        raw = quotients(scored, sampled, mask, per_sequence=True)[:, 0]
        applied, mask = applied[:, 0], mask.any(1)
    found |= _named("sampling/importance_sampling_ratio", applied, mask)
    found |= _named("sampling/raw_importance_sampling_ratio", raw, mask)
    return found | {"sampling/corrected_share": _spread((applied != raw).float(), mask)[1]}


def _spread(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(min, mean, max) of what the mask marks, without asking how much that is."""
    count, nothing = mask.sum(), torch.nan
    lowest, highest = torch.where(mask, values, torch.inf).amin(), torch.where(mask, values, -torch.inf).amax()
    mean = torch.where(mask, values, 0.0).sum() / count
    return torch.where(count > 0, lowest, nothing), mean, torch.where(count > 0, highest, nothing)


def _named(name: str, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {f"{name}/{kind}": value for kind, value in zip(("min", "mean", "max"), _spread(values, mask))}


def peak_memory_gib(device: torch.device) -> float | None:
    """Peak allocated GiB on a GPU since the process started, None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
