"""Two questions before the first optimizer step: do sampler and trainer agree, and is there anything to learn from?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram_grpo.errors import UserError
from lowvram_grpo.experience import Rollout

# Mean |difference| in nats. A missing mask costs about 1. LLM.int8 rounds activations, so that a decode step and a full
# pass over the same tokens differ by 0.1 to 0.2 (measured on SmolLM2-135M; nf4 differs by 1e-5).
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05, torch.int8: 0.5}
_WAY_OUT = "report this model, or set self_test to false (--no-self-test) to train anyway."
DEAD_SHARE = 0.5


def mean_gap(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Mean absolute difference over the masked tokens, in nats."""
    return float(((a - b).abs() * mask).sum() / mask.sum().clamp(min=1))


@dataclass(frozen=True)
class Elsewhere:
    """A sampler other than the policy.

    Attributes:
        name: for people.
        rounded: the policy's weights are quantized, and the sampler's perhaps not, or otherwise.
        filtered: its log-probs are those behind top-p, top-k, min-p or a penalty: no bound is known for that.
    """

    name: str
    rounded: bool
    filtered: bool

    def allowed(self, tolerance: float) -> float:
        """Mean nats a token. Its kernels are other ones, and compute in bfloat16."""
        if self.filtered:
            return float("inf")
        return max(tolerance, _TOLERANCE[torch.int8 if self.rounded else torch.bfloat16])


def self_test(
    sampled: Tensor,
    scored: Tensor,
    reference: Tensor | None,
    mask: Tensor,
    dtype: torch.dtype,
    *,
    elsewhere: Elsewhere | None = None,
) -> str:
    """Compare (B, T) log-probs of one rollout as the sampler, the scorer and the reference see them.

    Args:
        dtype: whose rounding separates them.
        elsewhere: what sampled, where that is not the policy itself.

    Returns:
        one sentence for the screen.

    Raises:
        UserError: they differ by more than rounding in `dtype` explains; training would follow a wrong gradient.
    """
    tolerance = _TOLERANCE.get(dtype, 0.1)
    gap = mean_gap(sampled, scored, mask)
    allowed = tolerance if elsewhere is None else elsewhere.allowed(tolerance)
    if not gap <= allowed:
        differ = (
            f"Self-test failed: sampled and scored log-probs differ by {gap:.3g} nats a token (allowed {allowed:g})"
        )
        if elsewhere is not None:
            raise UserError(
                f"{differ}, so {elsewhere.name} does not run the model that is trained; see that it serves the same "
                "weights, with --logprobs-mode processed_logprobs, or set self_test to false (--no-self-test)."
            )
        raise UserError(f"{differ}, so the model does not score what it sampled; {_WAY_OUT}")
    text = f"self-test passed: sampled and scored log-probs differ by {gap:.1e} nats a token"
    if allowed == float("inf"):
        text += f" ({elsewhere.name}'s are those behind the filters, so this is not judged)"
    if reference is not None:
        drift = mean_gap(scored, reference, mask)
        if not drift <= tolerance / 10:
            raise UserError(
                f"Self-test failed: policy and reference differ by {drift:.3g} nats a token before the first step, "
                f"where they must be the same model; {_WAY_OUT}"
            )
        text += f", policy and reference by {drift:.1e}"
    return text + "."


@dataclass(frozen=True)
class Signal:
    """What the first rollouts say about the job.

    Attributes:
        dead: share of groups whose completions all got the same reward: they teach nothing.
        truncated: share of completions that hit the length limit.
        silent: reward functions that gave 0 (or nothing) to every completion.
        mean: mean reward.
        equal: every completion of every group got the same reward.
    """

    dead: float
    truncated: float
    silent: tuple[str, ...]
    mean: float
    equal: bool = False

    @property
    def alive(self) -> bool:
        """Enough groups differ for GRPO to learn from."""
        return self.dead < DEAD_SHARE

    @property
    def absent(self) -> bool:
        """No group differs: every gradient of the reward is exactly zero."""
        return self.dead >= 1.0

    @property
    def saturated(self) -> bool:
        """Every completion earns the same positive reward from functions that all fire: the form is known, and there is
        nothing left to learn. A function that never fires leaves room above, however equal the totals are."""
        return self.equal and self.mean > 0 and not self.silent

    def sentence(self, *, has_references: bool) -> str:
        facts = (
            f"signal check: {self.dead:.0%} of the groups are dead (all rewards equal), "
            f"{self.truncated:.0%} of the completions truncated"
        )
        if self.silent:
            facts += f", {', '.join(self.silent)} never fired"
        if self.alive:
            return facts + "."
        if self.saturated:
            return (
                f"signal check: every completion already gets the same reward of {self.mean:.2f}, so nothing is left "
                "to learn from these prompts; use harder prompts, or a reward that tells good completions apart."
            )
        if self.silent and has_references:
            remedy = "warm the adapter up on the references first (cold start)"
        elif self.truncated > 0.5:
            remedy = "raise max_completion_length, most completions never finish"
        elif self.silent:
            remedy = (
                "show the wanted form in the prompt (--few-shot, --system-prompt), or begin from a model that knows it"
            )
        else:
            remedy = "raise num_generations or temperature, or use prompts the model gets right only sometimes"
        return f"{facts}; GRPO learns only from groups that differ: {remedy}."


def signal_of(rollout: Rollout, names: list[str]) -> Signal:
    per_func = rollout.rewards_per_func.nan_to_num(0.0)
    known = rollout.rewards[~rollout.rewards.isnan()]
    return Signal(
        dead=float(rollout.advantages.dead.float().mean()),
        truncated=sum(rollout.batch.truncated) / len(rollout.batch.truncated),
        silent=tuple(name for name, column in zip(names, per_func.T) if not bool(column.any())),
        mean=float(rollout.rewards.nanmean()),
        equal=bool((known == known[:1]).all()),
    )
