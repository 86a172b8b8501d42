"""Metrics between two log lines: everything that was added under a name is averaged when it is taken."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowvram_grpo.objective import CLIPPED, MAX_LOG_RATIO, Objective
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
        values: since they were last forgotten.
        last: what they were folded to last.
    """

    def __init__(self):
        self.values: dict[str, list[float]] = defaultdict(list)
        self.last: dict[str, float] = {}
        self._folded: dict[str, int] = {}

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
        """`fold`, and `forget`."""
        folded = self.fold()
        self.forget()
        return folded

    def forget(self) -> None:
        """What was folded; what has been added since then stays."""
        for name, count in self._folded.items():
            del self.values[name][:count]
            if not self.values[name]:
                del self.values[name]
        self._folded = {}

    def fold(self) -> dict[str, float]:
        """All metrics since the last `forget`. NaN (not applicable) counts in no mean."""
        folded = {}
        for name, values in self.values.items():
            present = [v for v in values if v == v] or [float("nan")]
            kind = name.rsplit("/", 1)[-1].rsplit("_", 1)[-1]
            folded[name] = {"min": min, "max": max}.get(kind, lambda v: sum(v) / len(v))(present)
        self._folded = {name: len(values) for name, values in self.values.items()}
        self.last = folded or self.last
        return folded


def complete_row(
    row: dict[str, float], books: Mapping[str, MetricBook], *, eval_prefix: str, tokens: int, device: torch.device
) -> None:
    """Add to a row of transformers' log what was measured since the last of its kind; it is the caller's to forget it.

    Args:
        books: `train` and `eval`.
        eval_prefix: `eval`, or `eval_NAME` for one of several datasets.
        tokens: seen by the model since the run began.
    """
    if any(key.startswith("eval_") for key in row):
        row.update({f"{eval_prefix}_{name}": value for name, value in books["eval"].fold().items()})
        row[f"{eval_prefix}_num_tokens"] = tokens
    elif "loss" in row or ("train_runtime" in row and books["train"]):
        # As in TRL, the last row has what was measured since the last logged step.
        row.update(books["train"].fold())
        row["num_tokens"] = tokens
        memory = peak_memory_gib(device)
        if memory is not None:
            row["memory/peak_gib"] = memory


def rollout_metrics(rollout: Rollout, names: list[str]) -> dict[str, float]:
    """Lengths and rewards of a rollout, with the names of its reward functions."""
    lengths = rollout.batch.sampled_lengths
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
    nobody waits for it. Means are over the update's tokens; where the ratio is a completion's, so is its clipping, and
    those that count in the loss are counted.

    Attributes:
        gaps: of the micro-batches that had one; numbers once `take` has been called.
        acted_entropy: mean entropy of the tokens that an entropy bonus acts on, once `take` has been called; NaN
            without any.
    """

    def __init__(self, objective: Objective | None = None):
        self.objective = objective or Objective()
        self.gaps: list[dict[str, Tensor]] | list[dict[str, float]] = []
        self.acted_entropy = math.nan
        self._sums: dict[str, Tensor] = {}
        self._extremes: list[dict[str, Tensor]] = []
        self._rows = self._diffuse = 0

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, sums: LossSums, scores: Scores, gap: dict[str, Tensor] | None = None) -> None:
        """A micro-batch's; `gap` is its `sampler_metrics`, where it is the first update on these tokens."""
        counted = sums.tokens > 0
        values = {"tokens": sums.tokens.sum(), "completions": counted.sum().float(), "entropy": sums.entropy}
        if sums.kl is not None:
            values["kl"] = sums.kl
        if scores.aux_loss is not None:
            values["aux_loss"] = scores.aux_loss
        if sums.bonus is not None:
            values["policy_loss"] = sums.bonus.policy_loss
            values["acted entropy"], values["acted tokens"] = sums.bonus.entropy, sums.bonus.tokens
        if sums.phi is not None:
            values["vespo/phi_seq_mean"] = torch.where(counted, sums.phi, 0.0).sum()
        extremes = {"ratio/min": sums.ratio_min, "ratio/max": sums.ratio_max}
        if self.objective.loss_type in (*CLIPPED, "cispo"):
            clipped, of_completions = self._clipping(sums, counted)
            values |= clipped
            extremes |= of_completions
        for name, total in values.items():
            total = total.detach()
            self._sums[name] = total if name not in self._sums else self._sums[name] + total
        if scores.diffuse is not None:
            self._rows += scores.rows
            self._diffuse += scores.diffuse
            if scores.bound is not None:
                extremes["sweep/direction_bound_max"] = scores.bound
        self._extremes.append(extremes)
        if gap is not None:
            self.gaps.append(gap)

    def _clipping(self, sums: LossSums, counted: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums of what was clipped, and the shares of the completions that were clipped least and most."""
        low, high = sums.low_clipped, sums.high_clipped
        if self.objective.per_sequence:  # all tokens of a completion share its ratio
            low, high, per_completion = (low > 0).float(), (high > 0).float(), 1.0
        else:
            per_completion = sums.tokens.clamp(min=1)
        if self.objective.loss_type == "cispo":
            return {"cispo_clip_ratio": high.sum()}, {}
        totals = {"low_mean": low.sum(), "high_mean": high.sum()}
        totals["region_mean"] = totals["low_mean"] + totals["high_mean"]
        extremes = {
            "low_min": torch.where(counted, low / per_completion, torch.inf).amin(),
            "high_max": torch.where(counted, high / per_completion, -torch.inf).amax(),
        }
        named = lambda found: {f"clip_ratio/{name}": value for name, value in found.items()}
        return named(totals), named(extremes)

    def take(self) -> dict[str, float]:
        """The update's metrics: the one moment at which the host waits for its forward and backward passes."""
        tokens, completions = (self._sums.pop(name).clamp(min=1) for name in ("tokens", "completions"))
        acted = {name: self._sums.pop(name) for name in ("acted entropy", "acted tokens") if name in self._sums}
        means = {name: total / self._divisor(name, tokens, completions) for name, total in self._sums.items()}
        found, acted, *rest = read([means, acted, *self._extremes, *self.gaps])
        if acted.get("acted tokens"):
            self.acted_entropy = acted["acted entropy"] / acted["acted tokens"]
        extremes, self.gaps = rest[: len(self._extremes)], rest[len(self._extremes) :]
        for name in dict.fromkeys(name for micro in extremes for name in micro):
            values = [micro[name] for micro in extremes if name in micro]
            found[name] = (min if name.endswith("min") else max)(values)
        if not found["ratio/min"] <= found["ratio/max"]:  # no token counted
            del found["ratio/min"], found["ratio/max"]
            found = {name: value for name, value in found.items() if not math.isinf(value)}
        if self._rows:
            found["sweep/diffuse_ratio"] = self._diffuse / self._rows
        return found

    def _divisor(self, name: str, tokens: Tensor, completions: Tensor) -> Tensor | float:
        """What a sum is divided by."""
        if name in ("policy_loss", "aux_loss"):  # whose micro-batches' are shares of the update's
            return 1.0
        of_completions = name.startswith("vespo/") or (self.objective.per_sequence and "clip_ratio" in name)
        return completions if of_completions else tokens


def sampler_metrics(
    scored: Tensor, sampled: Tensor, mask: Tensor, correction: Correction | None = None
) -> dict[str, Tensor]:
    """How far the trainer's log-probs (b, T) are from the sampler's, before the first update on them: scalars on their
    device, NaN where no token was sampled.

    With a correction the ratios under TRL's name are those that were applied, as there, and the quotients themselves
    stand beside them. Perplexities and divergences have ms-swift's names."""
    mask = mask.bool()
    difference, raw = (scored - sampled).abs(), quotients(scored, sampled, mask)
    of_difference, of_raw = _spread(torch.stack([difference, raw]), mask)
    found = {
        "sampling/sampling_logp_difference/mean": of_difference[1],
        "sampling/sampling_logp_difference/max": of_difference[2],
        **_divergences(scored, sampled, mask),
    }
    if correction is None:
        return found | _named("sampling/importance_sampling_ratio", of_raw)
    applied = correction.weights(scored, sampled, mask)
    if correction.per_sequence:
        # A completion without a token has no weight.
        raw = quotients(scored, sampled, mask, per_sequence=True)[:, 0]
        applied, mask = applied[:, 0], mask.any(1)
    of_applied, of_raw, changed = _spread(torch.stack([applied, raw, (applied != raw).float()]), mask)
    found |= _named("sampling/importance_sampling_ratio", of_applied)
    found |= _named("sampling/raw_importance_sampling_ratio", of_raw)
    return found | {"sampling/corrected_share": changed[1]}


def _divergences(scored: Tensor, sampled: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the sampler q is from the policy p, on tokens that q drew:

        kl          mean log p / q                      k3_kl       mean p / q - 1 - log p / q, an estimate of KL(q, p)
        *_ppl       mean over completions of exp(-1/|o| sum_t log-prob)
        ppl_ratio   mean over completions of training_ppl / rollout_ppl;  log_ppl_diff is of its logarithm
        chi2_token  mean (p / q)^2 - 1                  chi2_seq    the same of completions, p / q their geometric mean

    Logarithms beyond +-20 are cut.
    """
    zeroed = lambda x: torch.where(mask, x.detach().float(), 0.0)
    within = lambda x: x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    p, q = zeroed(scored), zeroed(sampled)
    gap, rows = within(p - q), mask.any(1)
    # Of masked tokens the gap is 0, and so are all three. Together, for each launch counts.
    of_tokens = torch.stack([gap, torch.expm1(gap) - gap, torch.expm1(2 * gap)]).sum((1, 2)) / mask.sum()
    of_p, of_q, of_gap = torch.stack([p, q, p - q]).sum(2) / mask.sum(1).clamp(min=1)
    row_gap = within(of_gap)
    of_completions = torch.stack([(-of_p).exp(), (-of_q).exp(), -row_gap, (-row_gap).exp(), torch.expm1(2 * row_gap)])
    of_completions = torch.where(rows, of_completions, 0.0).sum(1) / rows.sum()
    names = ("kl", "k3_kl", "chi2_token", "training_ppl", "rollout_ppl", "log_ppl_diff", "ppl_ratio", "chi2_seq")
    return {f"rollout_correction/{name}": value for name, value in zip(names, torch.cat([of_tokens, of_completions]))}


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """(k, 3) min, mean and max of k tensors of the mask's shape where it is set, without asking how much that is; NaN
    where it is nowhere."""
    count, of_each = mask.sum(), tuple(range(1, values.ndim))
    lowest, highest = (torch.where(mask, values, end) for end in (torch.inf, -torch.inf))
    total = torch.where(mask, values, 0.0).sum(of_each)
    found = torch.stack([lowest.amin(of_each), total / count, highest.amax(of_each)], 1)
    return torch.where(count > 0, found, torch.nan)


def _named(name: str, spread: Tensor) -> dict[str, Tensor]:
    return {f"{name}/{kind}": value for kind, value in zip(("min", "mean", "max"), spread)}


def peak_memory_gib(device: torch.device) -> float | None:
    """Peak allocated GiB on a GPU since the process started, None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
