"""The guard of a training run: which of its settings can be lowered in the middle of it, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.memory.guard import Event, Guard
from lowvram_grpo.memory.ladder import Rung
from lowvram_grpo.memory.optimizer import GuardedStep
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps

if TYPE_CHECKING:
    from lowvram_grpo.policy.reference import Reference
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.rewards.runner import RewardRunner
    from lowvram_grpo.rollout.engine import RolloutEngine
    from lowvram_grpo.rollout.vllm import VLLMEngine


class TrainerGuard(Guard):
    """Runs the phases of a step, and lowers settings by the rungs of `ladder`, then the usual ones.

    Args:
        model: the policy, whose layers are checkpointed or tiled.
        engine: its waves get smaller, and its workspace.
        args: changed with each rung; what reads them at each pass needs no more than that.
        notice: hears of each rung in one sentence.
        log: gets a row of metrics at each rung.
        reference: may be streamed from host memory, where it is a copy of all weights.
        rewards: whose models leave the card.

    Attributes:
        plan: how a rollout becomes optimizer steps, with the micro-batches of now.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: RolloutEngine | VLLMEngine,
        args: GRPOConfig,
        ladder: Sequence[Rung],
        *,
        notice: Callable[[str], None],
        log: Callable[[dict[str, Any]], None],
        reference: Reference | None = None,
        rewards: RewardRunner | None = None,
    ):
        self.reference = reference
        self._reward_models = [] if rewards is None else rewards.models
        self.model, self.engine, self.args, self.plan = model, engine, args, args.batch_plan()
        self._notice, self._log = notice, log
        self._step: GuardedStep | None = None
        on_card = {"reward_model_device": args.reward_model_device} if self._reward_models else {}
        copied = reference is not None and reference.model is not None
        super().__init__(
            {
                **on_card,
                **({"reference_offload": reference.offloaded} if copied else {}),
                "rollout_batch_size": args.rollout_batch_size or self.plan.completions_per_rollout,
                "per_device_train_batch_size": self.plan.micro_batch_size,
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

    def accumulate(self, gradients: Callable[[], Tensor]) -> Tensor:
        """What `gradients` returns, the loss of an update, once it has accumulated the update's gradients from zero.
        Done again, it sees the same random numbers (of dropout)."""
        restore = _random_numbers(self.args.device)

        def undo() -> None:
            self.model.zero_grad()
            restore()

        return self.run("forward", gradients, undo)

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
        if key == "reward_model_device":
            for judge in self._reward_models:
                judge.place(value)
        elif key == "rollout_batch_size":
            self.engine.rows = value
        elif key == "per_device_train_batch_size":
            self.plan = replace(self.plan, micro_batch_size=value)
        elif key == "gradient_checkpointing":
            try:
                checkpoint_activations(self.model, self.args.gradient_checkpointing_kwargs)
            except ValueError as error:  # of transformers, for a model that cannot
                raise UserError(f"gradient_checkpointing: {one_line(error)}") from error
        elif key == "mlp_tile":
            tile_mlps(self.model, value)
        elif key == "workspace_mib":
            self.engine.workspace_mib = value
        elif key == "reference_offload":
            if self.reference is None:
                raise UserError("reference_offload has no effect: with beta 0 there is no reference.")
            self.reference.offload()
        elif key == "optimizer_offload" and self._step is not None:
            self._step.offload = value
            self._step.settle()
        setattr(self.args, key, value)

    def _told(self, sentence: str, event: Event) -> None:
        self._notice(sentence)
        self._log({"memory/oom_phase": event.phase, "memory/rung": str(event.rung)})


def _random_numbers(device: torch.device) -> Callable[[], None]:
    """What brings the global generators, of the host and of `device`, back to where they are now."""
    devices = [device] if device.type == "cuda" else []
    host, there = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]

    def restore() -> None:
        torch.set_rng_state(host)
        for on, state in zip(devices, there):
            torch.cuda.set_rng_state(state, on)

    return restore
