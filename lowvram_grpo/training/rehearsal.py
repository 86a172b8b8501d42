"""The longest step there can be, run phase by phase: on meta tensors to count its bytes, on the device as a probe.

Both run the code that trains: the engine's prefill and decode step, the learner's scoring and loss, backward, the
optimizer. What it is given are lengths, not text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.training.experience import MicroBatch
from lowvram_grpo.training.learner import Learner

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowvram_grpo.recipe.config import GRPOConfig


@dataclass(frozen=True)
class Workload:
    """The largest optimizer step.

    Attributes:
        completions: in one rollout.
        group: completions that share a prompt (G).
        prompt, completion: their longest lengths in tokens.
        micro_batch: completions in one forward and backward pass.
    """

    completions: int
    group: int
    prompt: int
    completion: int
    micro_batch: int

    @property
    def accumulates(self) -> bool:
        """Whether an update has several micro-batches, so that gradients are there while activations are made."""
        return self.completions > self.micro_batch


def workload(args: GRPOConfig, config: PretrainedConfig, longest_prompt: int | None = None) -> Workload:
    """The largest step that `args` allow; `longest_prompt` is that of the data, where it is known."""
    plan = args.batch_plan()
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    prompt = min(x for x in (longest_prompt, args.max_prompt_length, limit) if x is not None)
    return Workload(
        plan.completions_per_rollout, plan.num_generations, prompt, args.max_completion_length, plan.micro_batch_size
    )


def longest_micro_batch(work: Workload, rows: int, device: torch.device) -> MicroBatch:
    """`rows` completions of full length behind prompts of full length; every token counts, every advantage differs."""
    shape = {"dtype": torch.long, "device": device}
    t = (rows, work.completion)
    signs = torch.ones(rows, device=device)
    signs[::2] = -1.0
    prompts = -(-rows // work.group)
    return MicroBatch(
        prompt_ids=torch.zeros(rows, work.prompt, **shape),
        prompt_mask=torch.ones(rows, work.prompt, **shape),
        completion_ids=torch.zeros(t, **shape),
        completion_mask=torch.ones(t, **shape),
        loss_mask=torch.ones(t, dtype=torch.bool, device=device),
        weights=torch.full(t, 1.0 / (rows * work.completion), device=device),
        advantages=signs,
        sampling_per_token_logps=torch.zeros(t, device=device),
        token_share=torch.full((rows,), 1.0 / (rows * work.completion), device=device),
        prompt_lengths=[work.prompt] * rows,
        completion_lengths=[work.completion] * rows,
        group_sizes=[min(work.group, rows - i * work.group) for i in range(prompts)],
    )


class Rehearsal:
    """One optimizer step of `work` on a model that is there.

    Args:
        phase: makes the context of a phase, by its name: the ledger's, or the guard's.
        backward: accumulates the gradients of a loss.
        making: makes a context in which what is made is of a category of the ledger.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: RolloutEngine,
        learner: Learner,
        *,
        phase: Callable[[str], AbstractContextManager],
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
        making: Callable[[str], AbstractContextManager] = lambda category: nullcontext(),
    ):
        self.model, self.engine, self.learner, self.phase, self.backward = model, engine, learner, phase, backward
        self.making = making
        self.device = next(p for p in model.parameters() if p.requires_grad).device

    def rollout(self, work: Workload) -> None:
        rows = min(self.engine.rows or work.completions, work.completions)
        with self.phase("rollout"), self.learner.autocast(), torch.no_grad():
            self.engine.rehearse(work.prompt, work.completion, rows, work.group, -(-work.completions // work.group))

    def gradients(self, work: Workload) -> None:
        """Scoring, forward and backward of the largest micro-batch; leaves gradients behind."""
        rows = min(work.micro_batch, work.completions)
        self.model.train()
        micro = longest_micro_batch(work, rows, self.device)
        with self.phase("score"):
            self.learner.prepare(micro)
        # A rollout is scored before its first update, when the last step's gradients are gone.
        if work.accumulates:
            self.blank_gradients()
        with self.phase("forward"), self.learner.autocast():
            loss = self.learner.loss(micro)[0].loss
        with self.phase("backward"):
            self.backward(loss)

    def blank_gradients(self) -> None:
        with self.making("gradients"):
            for p in self.model.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        with self.phase("optimizer"), self.making("optimizer"):
            optimizer.step()
