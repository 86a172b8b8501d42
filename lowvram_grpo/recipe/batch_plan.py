"""How the batch fields, TRL's and ours, become prompts, optimizer steps and micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class BatchFields(Protocol):
    """The fields of GRPOConfig that say how many completions go where."""

    prompts_per_step: int | None
    num_generations: int
    generation_batch_size: int | None
    steps_per_generation: int | None
    num_iterations: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int

    @property
    def world_size(self) -> int: ...


@dataclass(frozen=True)
class BatchPlan:
    """How one rollout becomes optimizer steps. All counts are per process.

    Attributes:
        prompts_per_rollout: prompts sampled from at once.
        num_generations: completions per prompt (G).
        updates_per_rollout: optimizer steps that share one rollout, each on its own slice of the completions.
        num_iterations: passes over the whole rollout (mu in the GRPO paper).
        micro_batch_size: completions in one forward and backward pass, at most.
    """

    prompts_per_rollout: int
    num_generations: int
    updates_per_rollout: int
    num_iterations: int
    micro_batch_size: int

    @classmethod
    def of(cls, args: BatchFields) -> BatchPlan:
        """Derive prompts, updates and micro-batches from whichever of the fields were set. Never fails on divisibility:
        completions are rounded up to whole groups."""
        group, rows = args.num_generations, args.per_device_train_batch_size
        per_step = _completions_a_step(args)
        if args.steps_per_generation:
            per_rollout = max(per_step, rows * args.steps_per_generation)
        elif args.generation_batch_size:
            per_rollout = max(per_step, args.generation_batch_size // max(args.world_size, 1))
        else:
            per_rollout = per_step
        prompts = math.ceil(per_rollout / group)
        updates = max(1, round(prompts * group / max(per_step, 1))) if per_rollout > per_step else 1
        return cls(prompts, group, updates, args.num_iterations, max(1, min(rows, prompts * group)))

    @property
    def completions_per_rollout(self) -> int:
        return self.prompts_per_rollout * self.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.updates_per_rollout * self.num_iterations


def step_notices(args: BatchFields) -> list[str]:
    """Where a step has another number of completions than the batch fields multiply to."""
    plan, group, per_step = BatchPlan.of(args), args.num_generations, _completions_a_step(args)
    total, updates = plan.completions_per_rollout, plan.updates_per_rollout
    if total == updates * per_step:
        return []
    if not (args.steps_per_generation or args.generation_batch_size):
        return [f"{per_step} completions a step do not make whole groups of {group}; a step uses {total}."]
    name = "generation_batch_size" if args.generation_batch_size else "steps_per_generation"
    counts = " or ".join(map(str, sorted({total // updates, -(-total // updates)})))
    return [
        f"with {name} {getattr(args, name)} a rollout has {total} completions, which make no whole number of steps "
        f"of {per_step}; a step uses {counts}."
    ]


def _completions_a_step(args: BatchFields) -> int:
    """As asked for, before they are rounded up to whole groups."""
    if args.prompts_per_step:
        return args.prompts_per_step * args.num_generations
    return args.per_device_train_batch_size * args.gradient_accumulation_steps
