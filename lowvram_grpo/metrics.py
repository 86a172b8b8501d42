"""Metrics between two log lines: everything that was added under a name is averaged when it is taken."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from lowvram_grpo.correction import Correction, quotients
from lowvram_grpo.loss import LossSums
from lowvram_grpo.scoring import Scores


class MetricBook:
    """Values by name. Minima and maxima (names ending in min or max) are folded as such; the rest are averaged."""

    def __init__(self):
        self._values: dict[str, list[float]] = defaultdict(list)

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._values[name].append(float(value))

    def take(self) -> dict[str, float]:
        """All metrics since the last call, and forget them. NaN (not applicable) counts in no mean."""
        folded = {}
        for name, values in self._values.items():
            present = [v for v in values if v == v] or [float("nan")]
            kind = name.rsplit("/", 1)[-1].rsplit("_", 1)[-1]
            folded[name] = {"min": min, "max": max}.get(kind, lambda v: sum(v) / len(v))(present)
        self._values.clear()
        return folded


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
    """Sums over the micro-batches of one update, divided once at its end."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._clipped: list[tuple[Tensor, Tensor]] = []
        self._ratios: list[tuple[Tensor, Tensor]] = []
        self._rows = self._diffuse = 0
        self._bounds: list[Tensor] = []

    def add(self, sums: LossSums, scores: Scores) -> None:
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
        self._clipped.append((sums.low_clipped / tokens, sums.high_clipped / tokens))
        self._ratios.append((sums.ratio_min, sums.ratio_max))
        if scores.diffuse is not None:
            self._rows += scores.rows
            self._diffuse += scores.diffuse
            self._bounds += [] if scores.bound is None else [scores.bound]

    def take(self) -> dict[str, float]:
        tokens = self._sums.pop("tokens").clamp(min=1)
        found = {name: float(total / tokens) for name, total in self._sums.items()}
        found["clip_ratio/low_min"] = min(float(low) for low, _ in self._clipped)
        found["clip_ratio/high_max"] = max(float(high) for _, high in self._clipped)
        lowest, highest = (fold(map(float, x)) for fold, x in zip((min, max), zip(*self._ratios)))
        if lowest <= highest:
            found |= {"ratio/min": lowest, "ratio/max": highest}
        if self._rows:
            found["sweep/diffuse_ratio"] = self._diffuse / self._rows
        if self._bounds:
            found["sweep/direction_bound_max"] = max(map(float, self._bounds))
        return found


def sampler_metrics(
    scored: Tensor, sampled: Tensor, mask: Tensor, correction: Correction | None = None
) -> dict[str, float]:
    """How far the trainer's log-probs (b, T) are from the sampler's, before the first update on them.

    With a correction the ratios under TRL's name are those that were applied, as there, and the quotients themselves
    stand beside them."""
    mask = mask.bool()
    if not bool(mask.any()):
        return {}
    difference = (scored - sampled)[mask].abs()
    found = {
        "sampling/sampling_logp_difference/mean": float(difference.mean()),
        "sampling/sampling_logp_difference/max": float(difference.max()),
    }
    raw = quotients(scored, sampled, mask)
    if correction is None:
        return found | _spread("sampling/importance_sampling_ratio", raw[mask])
    # A completion without a token has no weight.
    applied = correction.weights(scored, sampled, mask)
    if correction.per_sequence:
        raw = quotients(scored, sampled, mask, per_sequence=True)
        applied, raw = applied[mask.any(1), 0], raw[mask.any(1), 0]
    else:
        applied, raw = applied[mask], raw[mask]
    found |= _spread("sampling/importance_sampling_ratio", applied)
    found |= _spread("sampling/raw_importance_sampling_ratio", raw)
    return found | {"sampling/corrected_share": float((applied != raw).float().mean())}


def _spread(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}/{kind}": float(getattr(values, kind)()) for kind in ("min", "mean", "max")}


def peak_memory_gib(device: torch.device) -> float | None:
    """Peak allocated GiB on a GPU since the process started, None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
