"""The guard of a trainer: which of its settings can be lowered in the middle of a run, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.memory.guard import Event, Guard
from lowvram_grpo.memory.ladder import Rung
from lowvram_grpo.memory.optimizer import GuardedStep
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps

if TYPE_CHECKING:
    from lowvram_grpo.training.trainer import GRPOTrainer


class TrainerGuard(Guard):
    """Runs the phases of `trainer`, and lowers its settings by the rungs of `ladder`, then the usual ones."""

    def __init__(self, trainer: GRPOTrainer, ladder: Sequence[Rung]):
        args, plan = trainer.grpo_args, trainer.plan
        super().__init__(
            {
                "rollout_batch_size": args.rollout_batch_size or plan.completions_per_rollout,
                "per_device_train_batch_size": plan.micro_batch_size,
                "gradient_checkpointing": args.gradient_checkpointing,
                "activation_offload": args.activation_offload,
                "mlp_tile": args.mlp_tile,
                "workspace_mib": args.workspace_mib,
                "optimizer_offload": args.optimizer_offload,
            },
            self.take,
            ladder=ladder,
            tell=self._told,
            limits=f"prompts of up to {args.max_prompt_length} and completions of up to {args.max_completion_length} "
            "tokens",
            active=args.oom_step_down and args.device.type == "cuda",
        )
        self.trainer = trainer
        self._step: GuardedStep | None = None

    def guard_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Run the steps of `optimizer` under this guard too; of the one that accelerate has wrapped, if it has."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if self._step is None or self._step.optimizer is not optimizer:
            self._step = GuardedStep(optimizer, self, offload=self.settings["optimizer_offload"])

    def settle_moments(self) -> None:
        """Moments that a checkpoint brought to the device go where they belong."""
        if self._step is not None:
            self._step.settle()

    def take(self, key: str, value: Any) -> None:
        """Lower a setting.

        Raises:
            UserError: the model does not have what it changes.
        """
        trainer = self.trainer
        if key == "rollout_batch_size":
            trainer.collector.engine.rows = value
        elif key == "per_device_train_batch_size":
            trainer.plan = replace(trainer.plan, micro_batch_size=value)
        elif key == "gradient_checkpointing":
            try:
                checkpoint_activations(trainer.model, trainer.grpo_args.gradient_checkpointing_kwargs)
            except ValueError as error:  # of transformers, for a model that cannot
                raise UserError(f"gradient_checkpointing: {one_line(error)}") from error
        elif key == "mlp_tile":
            tile_mlps(trainer.model, value)
        elif key == "workspace_mib":
            trainer.collector.engine.workspace_mib = value
        elif key == "optimizer_offload" and self._step is not None:
            self._step.offload = value
            self._step.settle()
        # What reads GRPOConfig at each pass needs no more than this.
        setattr(trainer.grpo_args, key, value)

    def _told(self, sentence: str, event: Event) -> None:
        self.trainer.observer.notice(sentence)
        self.trainer.log({"memory/oom_phase": event.phase, "memory/rung": str(event.rung)})
