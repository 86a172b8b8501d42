"""Prompts in, scored completions out: encode, sample, decode, reward, compare within groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from lowvram_grpo.data.decoding import silent_ids, spoken
from lowvram_grpo.data.encoding import encode_prompts, row_kwargs
from lowvram_grpo.data.messages import is_conversational
from lowvram_grpo.memory.guard import Guard
from lowvram_grpo.objective import Advantages, decoupled_advantages, group_advantages
from lowvram_grpo.rewards.runner import RewardRunner
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.training.agents import Agents, Made
from lowvram_grpo.training.experience import Rollout

# What a reward function receives by name anyway, or must not see.
_NOT_COLUMNS = {
    "prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
    "reference_completion",
}  # fmt: skip

# What is being done while rewards are waited for: the policy is as the last step left it.
SCORING = "scoring"


def reward_columns(columns: Iterable[str], *, only_prompts: bool) -> list[str]:
    """The columns of the data that rewards receive beside prompts and completions."""
    return [] if only_prompts else [name for name in columns if name not in _NOT_COLUMNS]


def rollout_seed(seed: int, number: int) -> int:
    """Of the run's `seed` and a rollout's own number: its optimizer step, or less than 0 for evaluations."""
    return (seed * 1_000_003 + number) % 2**63


class Collector:
    """Rows of a dataset to a `Rollout`.

    Args:
        guard: runs the sampler.
        agents: make the completions where the policy does not just answer.
        tell: called with a short text at each phase ("sampling 16 completions").
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rewards: RewardRunner,
        tokenizer,
        guard: Guard,
        *,
        max_prompt_length: int | None,
        chat_template_kwargs: dict[str, Any] | None,
        scale_rewards: str,
        only_prompts: bool,
        tell: Callable[[str], None],
        aggregation: str = "sum_then_normalize",
        agents: Agents | None = None,
    ):
        self.engine, self.rewards, self.tokenizer, self.guard, self.tell = engine, rewards, tokenizer, guard, tell
        self.max_prompt_length, self.chat_template_kwargs = max_prompt_length, chat_template_kwargs
        self.scale_rewards, self.only_prompts, self.aggregation = scale_rewards, only_prompts, aggregation
        self.agents = agents
        # In place of `made`, where a subclass of the trainer makes completions itself.
        self.made_by: Callable[..., Made] | None = None

    @property
    def pad_id(self) -> int:
        return self.engine.sampling.pad_id

    def encode(self, prompts: list, own: Sequence[dict[str, Any]] | None = None) -> list[list[int]]:
        """Token ids of each prompt, cut to max_prompt_length; `own` are arguments of each for the chat template."""
        ids, _ = encode_prompts(
            self.tokenizer,
            prompts,
            max_prompt_length=self.max_prompt_length,
            chat_template_kwargs=self.chat_template_kwargs,
            own=own,
        )
        return ids

    def collect(
        self,
        rows: list[dict[str, Any]],
        num_generations: int,
        *,
        seed: int,
        trainer_state,
        sampling: Sampling | None = None,
    ) -> tuple[Rollout, dict]:
        """Sample G completions of each row and score them; also returns the metrics that rewards logged.

        Args:
            sampling: other settings than the engine's.

        Raises:
            UserError: a reward function failed.
        """
        started = time.perf_counter()
        self.tell(f"sampling {len(rows) * num_generations} completions")
        make = self.made_by or self.made
        made = self.guard.run("rollout", lambda: make(rows, num_generations, seed=seed, sampling=sampling))
        batch, prompts, completions = made.batch, made.prompts, made.completions
        self.tell(SCORING)
        scored = self.rewards(
            prompts,
            completions,
            batch.completion_ids,
            {**self._columns(rows, num_generations), **made.columns},
            trainer_state,
            seed=seed,
        )
        advantages = self.advantages(scored.total, scored.per_func, num_generations)
        rollout = Rollout(
            batch, prompts, completions, scored.total, scored.per_func, advantages, scored.extras,
            time.perf_counter() - started,
        )  # fmt: skip
        return rollout, {**scored.metrics, **made.metrics}

    def made(self, rows: list[dict[str, Any]], num_generations: int, *, seed: int, sampling: Sampling | None) -> Made:
        """G completions of each row, not yet rewarded."""
        if self.agents is not None:
            return self.agents.generate(self, rows, num_generations, seed=seed, sampling=sampling)
        prompts, other = [row["prompt"] for row in rows], {} if sampling is None else {"sampling": sampling}
        ids = self.encode(prompts, row_kwargs(rows))
        batch = self.engine.generate(ids, num_generations, seed=seed, **other)
        prompts = [prompt for prompt in prompts for _ in range(num_generations)]
        return Made(batch, prompts, self.decode(batch, prompts))

    def advantages(self, total: Tensor, per_func: Tensor, num_generations: int) -> Advantages:
        """Of rewards (B,), and (B, F) of each function, of groups of `num_generations`."""
        if self.aggregation == "normalize_then_sum":
            return decoupled_advantages(per_func, self.rewards.weights, num_generations)
        return group_advantages(total, num_generations, self.scale_rewards)

    def decode(self, batch: RolloutBatch, prompts: list) -> list:
        """What each completion says: a text, or a message where its prompt is a conversation."""
        sampling = self.engine.sampling
        silent = silent_ids(self.tokenizer, (*sampling.eos_ids, sampling.pad_id))
        texts = [spoken(self.tokenizer, ids, silent) for ids in batch.completion_ids]
        return [
            [{"role": "assistant", "content": text}] if is_conversational(prompt) else text
            for text, prompt in zip(texts, prompts)
        ]

    def _columns(self, rows: list[dict[str, Any]], num_generations: int) -> dict[str, list]:
        names = reward_columns(rows[0], only_prompts=self.only_prompts)
        return {name: [row[name] for row in rows for _ in range(num_generations)] for name in names}
