"""Before step 1: the longest step that can come, on the device, so that memory runs out now or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowvram_grpo.memory.budget import gib
from lowvram_grpo.memory.guard import release
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.training.learner import Learner
from lowvram_grpo.training.rehearsal import Rehearsal, workload
from lowvram_grpo.training.savers import TrainerGuard

if TYPE_CHECKING:
    from lowvram_grpo.run.observer import Observer


def probe(
    learner: Learner,
    guard: TrainerGuard,
    longest_prompt: int,
    *,
    backward: Callable[[Tensor], None],
    observer: Observer,
    moments: bool,
) -> None:
    """Rehearse under the guard, which takes savers until the longest step fits; nothing of it is kept.

    Weights, optimizer, random numbers and the place in the data are as before.

    Args:
        longest_prompt: of the data, in tokens.
        backward: accumulates the gradients of a loss.
        moments: whether the optimizer has made its moments; until then something else holds their place.

    Raises:
        UserError: it does not fit, and there is no saver left.
    """
    model, args = learner.model, learner.args
    rehearsal = Rehearsal(model, guard.engine, learner, phase=guard.phase, backward=backward)
    longest = workload(args, unwrap(model).config, longest_prompt)
    work = lambda: replace(longest, micro_batch=guard.plan.micro_batch_size)
    device, was_training = args.device, model.training
    devices = [device] if device.type == "cuda" else []
    observer.phase("memory probe")
    held = None if moments or args.optimizer_offload else _moments(learner)
    try:
        with torch.random.fork_rng(devices):
            guard.run("rollout", lambda: rehearsal.rollout(work()))
            guard.run("forward", lambda: rehearsal.gradients(work()), model.zero_grad)
    finally:
        del held
        model.zero_grad()
        model.train(was_training)
        release()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        observer.notice(f"memory probe: the longest step there can be takes {gib(peak)} of GPU memory.")


def _moments(learner: Learner) -> Tensor:
    """As many bytes as the optimizer's two moments will take."""
    trained = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    each = 1 if "8bit" in str(learner.args.optim) else 4
    return torch.empty(2 * each * trained, dtype=torch.uint8, device=learner.args.device)
