"""How long a step will take, said before the first one: from the rollout and the scoring that the checks do anyway.

One forward pass over the rollout is the unit. A backward pass is another one where an adapter is trained (activations
get gradients, frozen weights none) and two where all weights are; recomputed activations are one more, and so is every
scoring pass. What the optimizer, logging, saving and evaluation take is left out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowvram_grpo.errors import counted
from lowvram_grpo.policy.wrapper import is_peft

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowvram_grpo.recipe.batch_plan import BatchPlan
    from lowvram_grpo.training.experience import Rollout
    from lowvram_grpo.training.learner import Learner

# Completions that stay below this share of the limit may grow, and the steps with them.
_SHORT = 0.8


@dataclass(frozen=True)
class Pace:
    """What is known of a rollout and of the steps that learn from it.

    Attributes:
        sampling: seconds from prompts to rewards.
        scoring: seconds of one forward pass over all its completions; None: none was timed.
        completions, mean_length, limit: how many, their mean length and max_completion_length in tokens.
        steps, updates: optimizer steps that a rollout serves, and the parts that it is cut into for them.
        each_step, each_rollout: forward passes, over an update's completions and over all of them.
        run: optimizer steps of the whole run.
        evaluated: evaluations come between them.
        resampled: dead groups may be sampled anew.
    """

    sampling: float
    scoring: float | None
    completions: int
    mean_length: float
    limit: int
    steps: int
    updates: int
    each_step: int
    each_rollout: int
    run: int
    evaluated: bool = False
    resampled: bool = False

    @property
    def step(self) -> float:
        """Seconds of an optimizer step, sampling shared among the steps that it serves."""
        scoring = self.scoring or 0.0
        learning = scoring * (self.each_step / self.updates + self.each_rollout / self.steps)
        return self.sampling / self.steps + learning

    def sentence(self) -> str:
        about = "at least" if self.scoring is None else "about"
        sampled = f"{counted(self.completions, 'completion')} of up to {self.limit} tokens"
        took = f"took {spoken(self.sampling)} to sample and reward"
        if self.mean_length < _SHORT * self.limit:
            sampled += f", {self.mean_length:.0f} on average,"
            took += "; longer ones take longer"
        more = [("evaluations", self.evaluated), ("groups that are sampled anew", self.resampled)]
        left = " and ".join(name for name, there in more if there)
        return (
            f"estimate: a step will take {about} {spoken(self.step)} ({sampled} {took}), the "
            f"{counted(self.run, 'step')} of this run {about} {spoken(self.step * self.run)}"
            f"{f', {left} not counted' if left else ''}."
        )


def spoken(seconds: float) -> str:
    """Seconds in the unit that a person would take, to two digits: an estimate has no more."""
    for size, unit in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(x: float) -> str:
    return f"{float(f'{x:.2g}'):.0f}" if x >= 9.95 else f"{x:.1f}" if x >= 0.095 else f"{x:.1g}"


def timed(work: Callable, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> tuple:
    """(what `work` returns, seconds until the device had done it)."""
    started = clock()
    done = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done, clock() - started


def pace_of(learner: Learner, plan: BatchPlan, rollout: Rollout, scored: tuple[int, float] | None, *, run: int) -> Pace:
    """The pace of training with `learner`, seen on the rollout of step 1.

    Args:
        scored: tokens (prompts included) of the micro-batch that was scored without gradient, and the seconds that it
            took; None where none was.
        run: optimizer steps of the whole run.
    """
    args, batch = learner.args, rollout.batch
    lengths = [len(ids) for ids in batch.completion_ids]
    joint = learner.joint_reference
    each_step = (2 if is_peft(learner.model) else 3) + int(args.gradient_checkpointing) + int(joint)
    each_rollout = int(plan.steps_per_rollout > 1) + int(learner.reference is not None and not joint)
    tokens = sum(lengths) + sum(map(len, batch.prompt_ids))
    return Pace(
        sampling=rollout.seconds,
        scoring=None if scored is None else scored[1] * tokens / max(scored[0], 1),
        completions=len(lengths),
        mean_length=sum(lengths) / max(len(lengths), 1),
        limit=args.max_completion_length,
        steps=plan.steps_per_rollout,
        updates=plan.updates_per_rollout,
        each_step=each_step,
        each_rollout=each_rollout,
        run=run,
        evaluated=args.eval_strategy != "no",
        resampled=args.resample_dead_groups > 0,
    )
