"""Before step 1: the longest step that can come, on the device, so that memory runs out now or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lowvram_grpo.memory.budget import gib
from lowvram_grpo.memory.guard import release
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.training.rehearsal import Rehearsal, workload

if TYPE_CHECKING:
    from lowvram_grpo.training.trainer import GRPOTrainer


def probe(trainer: GRPOTrainer, longest_prompt: int) -> None:
    """Rehearse under the guard, which takes savers until the longest step fits; nothing of it is kept.

    Weights, optimizer, random numbers and the place in the data are as before.

    Raises:
        UserError: it does not fit, and there is no saver left.
    """
    rehearsal = Rehearsal(
        trainer.model,
        trainer.collector.engine,
        trainer.learner,
        phase=trainer.guard.phase,
        backward=trainer.accelerator.backward,
    )
    longest = workload(trainer.grpo_args, unwrap(trainer.model).config, longest_prompt)
    work = lambda: replace(longest, micro_batch=trainer.plan.micro_batch_size)
    device, was_training = trainer.args.device, trainer.model.training
    devices = [device] if device.type == "cuda" else []
    trainer.observer.phase("memory probe")
    # The optimizer makes its moments in step 1; until then something else holds their place.
    held = _moments(trainer)
    try:
        with torch.random.fork_rng(devices):
            trainer.guard.run("rollout", lambda: rehearsal.rollout(work()))
            trainer.guard.run("forward", lambda: rehearsal.gradients(work()), trainer.model.zero_grad)
    finally:
        del held
        trainer.model.zero_grad()
        trainer.model.train(was_training)
        release()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        trainer.observer.notice(f"memory probe: the longest step there can be takes {gib(peak)} of GPU memory.")


def _moments(trainer: GRPOTrainer) -> torch.Tensor | None:
    """As many bytes as the optimizer's two moments will take."""
    if trainer.grpo_args.optimizer_offload or trainer.optimizer is not None:
        return None
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    each = 1 if "8bit" in str(trainer.args.optim) else 4
    return torch.empty(2 * each * trained, dtype=torch.uint8, device=trainer.args.device)
