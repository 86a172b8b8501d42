"""Evaluation: prompts are sampled, rewarded and scored as in training, and their metrics go out under `eval_`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Trainer

from lowvram_grpo.training.metrics import MetricBook, UpdateSums

if TYPE_CHECKING:
    from lowvram_grpo.training.experience import MicroBatch, Rollout
    from lowvram_grpo.training.learner import Learner
    from lowvram_grpo.training.savers import TrainerGuard


class Evaluates(Trainer):
    """To be named among a trainer's bases; it brings what is named here without a value."""

    learner: Learner
    guard: TrainerGuard
    metrics: dict[str, MetricBook]
    collect: Callable[..., Rollout]
    cut: Callable[[Rollout, int], list[list[MicroBatch]]]
    _sums: UpdateSums
    _eval_batches: int
    _eval_rows: int

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Remember under which name (`eval_NAME` for one of several datasets) the metrics go out."""
        self._eval_prefix, self._eval_batches, self._eval_rows = metric_key_prefix, 0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        return output._replace(num_samples=self._eval_rows)  # of a stream transformers knows no number

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Sample, reward and score a batch of evaluation prompts; metrics go out under eval_*."""
        rollout = self.collect(inputs, self.state.global_step, mode="eval")
        self._eval_batches += 1
        self._eval_rows += len(inputs)
        was_training = self.model.training
        self.model.eval()
        loss = self.guard.run("score", lambda: self._evaluated(rollout))
        self.model.train(was_training)
        self.metrics["eval"].add_update(self._sums)
        return loss, None, None

    @torch.no_grad()
    def _evaluated(self, rollout: Rollout) -> Tensor:
        self._sums, loss = UpdateSums(self.learner.objective), torch.zeros((), device=self.args.device)
        for micro in self.learner.with_entropy_masks(self.cut(rollout, 1)[0]):
            with self.compute_loss_context_manager():
                self.learner.add_reference(micro)
                loss += self.compute_loss(self.model, micro)
        return loss
