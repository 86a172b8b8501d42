"""When the reference follows the policy: at the moments at which TRL's SyncRefModelCallback lets it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lowvram_grpo.training.learner import Learner


class ReferenceSync(TrainerCallback):
    """After each optimizer step whose number (counted from 1, over resumes) ref_model_sync_steps divides, the last one
    included, and before that step is evaluated or saved: a checkpoint holds the reference that the next step sees.

    A rollout that serves several steps keeps the reference's log-probs that it was scored with.
    """

    def __init__(self, learner: Learner):
        self.learner = learner

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learner.sync_reference(state.global_step)
