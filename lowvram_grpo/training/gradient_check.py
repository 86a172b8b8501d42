"""Whether the gradient reaches what is trained: a run that learns nothing must not look like one that does."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.recipe.settings import STEP_IN_BACKWARD
from lowvram_grpo.training.experience import MicroBatch, Rollout

# One step could be chance: log-probs so close to 0 that they round to it.
_STEPS = 2


def could_teach(rollout: Rollout) -> bool:
    """Whether some group has different completions with different rewards. Where a group's completions are the same
    and only its rewards differ, their gradients cancel out."""
    size = len(rollout.advantages.values) // len(rollout.advantages.dead)
    rows = enumerate(rollout.batch.completion_ids)
    for (_, group), dead in zip(groupby(rows, lambda row: row[0] // size), rollout.advantages.dead.tolist()):
        if not dead and len({tuple(ids) for _, ids in group}) > 1:
            return True
    return False


class GradientCheck:
    """Looks at the first steps, until a gradient was seen."""

    def __init__(self, optim: str):
        self._done = any(name in optim for name in STEP_IN_BACKWARD)
        self._zeros = 0

    def look(self, model: nn.Module, update: list[MicroBatch], *, live: bool, clipped: float) -> None:
        """To be called between the backward pass and the optimizer's step.

        Args:
            update: what the step learned from, with the weights that the loss took.
            live: see `could_teach`.
            clipped: share of its tokens whose ratio was clipped: they have no gradient.

        Raises:
            UserError: every gradient of the second such step was exactly zero, as those of the first.
        """
        if self._done:
            return
        if _any(p.grad for p in model.parameters() if p.requires_grad and p.grad is not None):
            self._done = True
        elif live and not clipped and _any(m.advantages[:, None] * m.weights for m in update):
            self._zeros += 1
            if self._zeros == _STEPS:
                raise UserError(
                    f"The gradient was exactly zero in the first {_STEPS} steps although the rewards differ: the "
                    "weights that are trained have no part in the model's log-probs, and nothing would be learned; "
                    "train a LoRA adapter on layers that the model uses (target_modules 'all-linear')."
                )


def _any(tensors: Iterable[Tensor]) -> bool:
    """Whether anything in them is not zero, asked once for all of them."""
    found = [tensor.any() for tensor in tensors]
    return bool(found) and bool(torch.stack(found).any())
