"""What rollouts say: do sampler and trainer agree, is there anything to learn from, and did every reward judge?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvram_grpo.errors import UserError
from lowvram_grpo.training.experience import Rollout

# Mean |difference| in nats. A missing mask costs about 1. LLM.int8 rounds activations, so that a decode step and a full
# pass over the same tokens differ by 0.1 to 0.2 (measured on SmolLM2-135M; nf4 differs by 1e-5). Models differ in how
# much they make of bfloat16's rounding: 24 layers of random weights, 0.105 on an H200 where nothing was wrong.
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.3, torch.float16: 0.1, torch.int8: 0.5}
# Of the tolerance: a share worth saying.
_MUCH = 1 / 3
_WAY_OUT = "report this model, or set self_test to false (--no-self-test) to train anyway."
DEAD_SHARE = 0.5
# Tokens within which an answer that ends at all should have ended.
_GENEROUS = 200
_SHORT = 120


def mean_gap(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Mean absolute difference over the masked tokens, in nats."""
    return float(((a - b).abs() * mask).sum() / mask.sum().clamp(min=1))


@dataclass(frozen=True)
class OtherSampler:
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
    sampled: Tensor | None,
    scored: Tensor,
    reference: Tensor | None,
    mask: Tensor,
    dtype: torch.dtype,
    *,
    other: OtherSampler | None = None,
) -> str:
    """Compare (B, T) log-probs of one rollout as the sampler, the scorer and the reference see them.

    Args:
        sampled: None where the sampler gave none.
        dtype: whose rounding separates them.
        other: what sampled, where that is not the policy itself.

    Returns:
        one sentence for the screen.

    Raises:
        UserError: they differ by more than rounding in `dtype` explains; training would follow a wrong gradient.
    """
    tolerance = _TOLERANCE.get(dtype, 0.1)
    if sampled is None:
        name = "the sampler" if other is None else other.name
        return f"self-test: {name} gives no log-probs, so nobody knows whether it is the model that is trained."
    gap = mean_gap(sampled, scored, mask)
    allowed = tolerance if other is None else other.allowed(tolerance)
    if not gap <= allowed:
        differ = (
            f"Self-test failed: sampled and scored log-probs differ by {gap:.3g} nats a token (allowed {allowed:g})"
        )
        if other is not None:
            raise UserError(
                f"{differ}, so {other.name} does not run the model that is trained; see that it serves the same "
                "weights, with --logprobs-mode processed_logprobs, or set self_test to false (--no-self-test)."
            )
        raise UserError(f"{differ}, so the model does not score what it sampled; {_WAY_OUT}")
    text = f"self-test passed: sampled and scored log-probs differ by {gap:.1e} nats a token"
    if _MUCH * allowed < gap:
        text += ", which is much for rounding alone: watch sampling/sampling_logp_difference"
    if allowed == float("inf"):
        text += f" ({other.name}'s are those behind the filters, so this is not judged)"
    if reference is not None:
        drift = mean_gap(scored, reference, mask)
        if not drift <= min(tolerance, 0.1) / 10:
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
        silent: reward functions that gave 0 (or nothing) to every completion; of a penalty 0 is no silence.
        mean: mean reward.
        equal: every completion of every group got the same reward.
        unjudged: every reward function gave None to every completion.
        reference: what the first prompt was to be judged by, if unjudged and there is such a thing.
        endless: what to do about completions that never end although they had the room; empty where they do.
        left_out: mask_truncated_completions leaves every completion out of the loss.
    """

    dead: float
    truncated: float
    silent: tuple[str, ...]
    mean: float
    equal: bool = False
    unjudged: bool = False
    reference: str | None = None
    endless: str = ""
    left_out: bool = False

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
        if self.unjudged:
            example = "" if self.reference is None else f", as for the reference {self.reference}"
            return (
                f"signal check: {', '.join(self.silent)} gave None to every completion{example}, so there is nothing "
                "to learn from; take a reward that can judge such references, or references that this one can read."
            )
        facts = (
            f"signal check: {self.dead:.0%} of the groups are dead (all rewards equal), "
            f"{self.truncated:.0%} of the completions truncated"
        )
        if self.silent:
            facts += f", {', '.join(self.silent)} never fired"
        if self.left_out:
            remedy = self.endless or "raise max_completion_length, or drop mask_truncated_completions"
            return f"{facts}; mask_truncated_completions leaves all out, so there is nothing to learn from: {remedy}."
        if self.alive:
            return f"{facts}; {self.endless}." if self.endless else f"{facts}."
        if self.saturated:
            return (
                f"signal check: every completion already gets the same reward of {self.mean:.2f}, so nothing is left "
                "to learn from these prompts; use harder prompts, or a reward that tells good completions apart."
            )
        if self.silent and has_references:
            remedy = "warm the adapter up on the references first (cold start)"
        elif self.endless:
            remedy = self.endless
        elif self.truncated > 0.5:
            remedy = "raise max_completion_length, most completions never finish"
        elif self.silent:
            remedy = (
                "show the wanted form in the prompt (--few-shot, --system-prompt), or begin from a model that knows it"
            )
        else:
            remedy = "raise num_generations or temperature, or use prompts the model gets right only sometimes"
        return f"{facts}; GRPO learns only from groups that differ: {remedy}."


def signal_of(
    rollout: Rollout,
    names: list[str],
    *,
    reference: Any = None,
    endless: str = "",
    masked: bool = False,
    penalties: Collection[str] = (),
) -> Signal:
    """What a rollout says; `reference` is that of its first prompt, `endless` what `endless_remedy` found, `masked`
    whether truncated completions are left out, `penalties` are the functions whose best is 0."""
    fired = {
        name: bool(column.nan_to_num(0.0).any()) or (name in penalties and not bool(column.isnan().all()))
        for name, column in zip(names, rollout.rewards_per_func.T)
    }
    known = rollout.rewards[~rollout.rewards.isnan()]
    unjudged = not len(known)
    return Signal(
        dead=float(rollout.advantages.dead.float().mean()),
        truncated=sum(rollout.batch.truncated) / len(rollout.batch.truncated),
        silent=tuple(name for name in names if not fired[name]),
        mean=float(rollout.rewards.nanmean()),
        equal=bool((known == known[:1]).all()),
        unjudged=unjudged,
        reference=shortened(reference) if unjudged and reference is not None else None,
        endless=endless,
        left_out=masked and all(rollout.batch.truncated),
    )


def endless_remedy(rollout: Rollout, tokenizer, ends: Sequence[int], limit: int) -> str:
    """What to do where no completion wrote one of the `ends` within `limit` tokens; empty where some did, or had no
    room to.

    A base model is often trained on chats whose turns end in another token than its texts do: one that it writes, but
    that ends nothing, is named.
    """
    if not all(rollout.batch.truncated):
        return ""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - set(ends)
    written = Counter(i for ids in rollout.batch.sampled_ids for i in special.intersection(ids))
    names = ", ".join(tokenizer.convert_ids_to_tokens(list(ends))) or "none is known"
    if written and (most := written.most_common(1)[0])[1] * 2 >= len(rollout.batch.truncated):
        token = tokenizer.convert_ids_to_tokens(most[0])
        return (
            f"no completion wrote an end token ({names}), but most wrote {token}: stop there as well, with "
            f"--generation-kwargs '{{\"eos_token_id\": {[*ends, most[0]]}}}'"
        )
    if limit < _GENEROUS:
        return ""
    return (
        f"no completion wrote an end token ({names}) in {limit} tokens, as if the model did not know how to end: begin "
        "from an instruct model, warm it up on references (--cold-start), or show it answers that end (--few-shot)"
    )


class RolloutChecks:
    """What is looked at in rollouts as they come, and told once.

    Args:
        known_metrics: called with the metrics that rewards have logged, once, at the first rollout that is trained on.
        tell: hears of the first completion that no reward function judged.
    """

    def __init__(self, known_metrics: Callable[[dict[str, float]], None], tell: Callable[[str], None]):
        self._known_metrics: Callable[[dict[str, float]], None] | None = known_metrics
        self._tell: Callable[[str], None] | None = tell

    def look(self, rollout: Rollout, rows: list[dict[str, Any]], logged: dict[str, float], *, training: bool) -> None:
        """At a rollout, the `rows` of the data it was made from, and what its rewards `logged`."""
        if training and self._known_metrics is not None:
            known_metrics, self._known_metrics = self._known_metrics, None
            known_metrics(logged)
        if self._tell is not None and (warning := unjudged_row(rollout, rows)):
            self._tell(warning)
            self._tell = None


def unjudged_row(rollout: Rollout, rows: list[dict[str, Any]]) -> str | None:
    """TRL's warning for the first completion that no reward function judged, with what they were given; None where
    there is none."""
    unjudged = rollout.rewards.isnan().nonzero().flatten().tolist()
    if not unjudged:
        return None
    first = unjudged[0]
    row = rows[first * len(rows) // len(rollout.rewards)]
    given = {**row, "prompt": rollout.prompts[first], "completion": rollout.completions[first]}
    text = ", ".join(f"{name}={shortened(value)}" for name, value in given.items())
    return (
        f"All reward functions returned None for the following kwargs: {text}. Please ensure that at least one reward "
        "function returns a valid reward; such a completion is left out of the loss (said once)."
    )


def shortened(value: Any) -> str:
    """Its repr, with the middle left out where it is long."""
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        value = value[-1]["content"]  # of a conversation the last turn
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[: _SHORT // 2]}...{text[-_SHORT // 2 :]}"
