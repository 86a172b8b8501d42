"""The passes of an evaluation: greedy and sampled, of a policy and of its base, over the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lowvram_grpo.jobs.evaluation import Scored, completion_rows, evaluate
from lowvram_grpo.memory.guard import Guard
from lowvram_grpo.plan.paper import ladder_of
from lowvram_grpo.run import jsonl
from lowvram_grpo.training.collect import Collector

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

    from lowvram_grpo.jobs.eval_job import Wanted
    from lowvram_grpo.jobs.inference import LoadedPolicy
    from lowvram_grpo.rewards.runner import RewardRunner
    from lowvram_grpo.rollout.sampler import Sampling
    from lowvram_grpo.training.experience import Rollout

# Whole waves of any preset on a GPU; on a CPU, few enough for the progress bar to move.
_COMPLETIONS_A_CALL = {"cuda": 64, "cpu": 16}


class Progress(Protocol):
    """Where a person sees how far it is."""

    def begin(self, name: str) -> None:
        """A pass begins."""

    def add(self, completions: int, tokens: int) -> None:
        """So many more are done."""


class Pass(NamedTuple):
    """`group` completions of each prompt by `policy` (base, adapter, or model where there is one alone)."""

    policy: str
    kind: str
    sampling: Sampling
    group: int


class Passes:
    """What is wanted of `policy`, pass by pass.

    Args:
        rewards: score the completions.
        tell: hears what was lowered when memory ran out.
    """

    def __init__(self, policy: LoadedPolicy, rewards: RewardRunner, wanted: Wanted, tell: Callable[[str], None]):
        self.policy, self.rewards, self.wanted = policy, rewards, wanted
        self._call = _COMPLETIONS_A_CALL.get(policy.args.device.type, 16)
        self._collector = _collector(policy, rewards, _guard(policy, self._call, tell))
        sampled = replace(policy.sampling, **wanted.filters)
        greedy = replace(sampled, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
        self.passes = [
            Pass(name, kind, sampling, group)
            for name in ["base"] * wanted.compare_base + ["adapter" if policy.has_adapter else "model"]
            for kind, sampling, group, asked in (
                ("greedy", greedy, 1, wanted.greedy),
                ("sampled", sampled, wanted.samples, wanted.samples),
            )
            if asked
        ]

    def completions(self, prompts: int) -> int:
        """Of all passes over so many prompts."""
        return prompts * sum(one.group for one in self.passes)

    def run(self, data: Dataset, progress: Progress) -> dict[str, dict[str, Scored]]:
        """policy -> kind -> scores, both in the order in which they are shown; `wanted.out` gets every completion.

        Raises:
            UserError: as `evaluate`.
        """
        log = None if self.wanted.out is None else _fresh_log(self.wanted.out)
        scored: dict[str, dict[str, Scored]] = {one.policy: {} for one in self.passes}
        with self.policy.autocast():
            for one in self.passes:
                progress.begin(f"{one.policy}, {one.kind}" if self.wanted.compare_base else one.kind)
                with self.policy.adapter(one.policy != "base"):
                    scored[one.policy][one.kind] = evaluate(
                        self._collector,
                        data,
                        one.group,
                        sampling=one.sampling,
                        seed=self.policy.args.seed,
                        completions_a_call=self._call,
                        seen=self._seen(one, progress, log),
                    )
        return scored

    def _seen(self, one: Pass, progress: Progress, log: Path | None) -> Callable[[int, Rollout], None]:
        def seen(first: int, rollout: Rollout) -> None:
            progress.add(len(rollout.rewards), sum(map(len, rollout.batch.completion_ids)))
            if log is not None:
                rows = completion_rows(rollout, self.rewards.names, first, one.group)
                jsonl.append(log, ({"policy": one.policy, "pass": one.kind, **row} for row in rows))

        return seen


def _fresh_log(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "completions.jsonl"
    log.unlink(missing_ok=True)  # of an evaluation that was broken off
    return log


def _collector(policy: LoadedPolicy, rewards: RewardRunner, guard: Guard) -> Collector:
    args = policy.args
    return Collector(
        policy.engine,
        rewards,
        policy.tokenizer,
        guard,
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
        scale_rewards="none",
        only_prompts=bool(args.remove_unused_columns),
        tell=lambda phase: None,
    )


def _guard(policy: LoadedPolicy, rows: int, tell: Callable[[str], None]) -> Guard:
    """When memory runs out: smaller waves, then smaller tiles of the head."""
    args, engine = policy.args, policy.engine
    names = {"rollout_batch_size": "rows"}
    # What the ladder could lower of a training run stands at its end already.
    settings = {"per_device_train_batch_size": 1, "optimizer_offload": True, "activation_offload": True}
    settings |= {"rollout_batch_size": engine.rows or rows, "workspace_mib": args.workspace_mib}
    return Guard(
        settings,
        lambda key, value: setattr(engine, names.get(key, key), value),
        ladder=ladder_of(policy.recipe.preset),
        tell=lambda sentence, event: tell(sentence),
        limits=f"prompts of up to {args.max_prompt_length} and completions of up to {args.max_completion_length} "
        "tokens",
        active=args.oom_step_down and args.device.type == "cuda",
    )
