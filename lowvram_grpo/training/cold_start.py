"""A few supervised steps on formatted references, so that GRPO has a reward to compare.

As in DeepSeek-R1's recipe (arXiv:2501.12948, section 2.3.1): where a model never writes the form that the rewards look
for, every group is dead and GRPO learns nothing. The same adapter is warmed up through the same model and the same
sweep; the loss is the mean negative log-prob of the reference's tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lowvram_grpo.policy.dropout import training_mode
from lowvram_grpo.rollout.batch import pad_left
from lowvram_grpo.training.experience import pad_right
from lowvram_grpo.training.scoring import score

REFERENCE_COLUMN = "reference_completion"


def reference_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a reference as a completion: the text and the end of the turn, which the text may hold already."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


class ColdStart:
    """Supervised steps over (prompt ids, completion ids) pairs, endless and in a fixed order.

    The optimizer is its own and is dropped afterwards: GRPO starts with clean moments.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Callable[[int], list[tuple[list[int], list[int]]]],
        *,
        learning_rate: float,
        guarded: Callable[[Callable[[int, int], float], Callable[[], None]], float],
        pad_id: int,
        offload: Callable[[], bool] = lambda: False,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        max_grad_norm: float = 1.0,
        fp16: bool = False,
    ):
        """`pairs(step)` gives the batch of a step; `fp16` scales the loss, whose gradients would underflow;
        `offload` says whether activations wait in host memory.
        `guarded(work, undo)` calls `work(micro_batch_size, workspace_mib)`, again after `undo()` where memory ran out.
        """
        self.model, self.pairs, self.guarded, self.pad_id, self.offload = model, pairs, guarded, pad_id, offload
        self.max_grad_norm = max_grad_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer(self.parameters, lr=learning_rate, weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=fp16)

    def step(self, index: int, autocast: Callable) -> float:
        """One optimizer step; returns the mean negative log-prob (nats a token) before it."""
        batch = self.pairs(index)
        training_mode(self.model)
        total = self.guarded(
            lambda micro_batch_size, workspace_mib: self._gradients(batch, autocast, micro_batch_size, workspace_mib),
            self.optimizer.zero_grad,
        )
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _gradients(self, batch: list, autocast: Callable, micro_batch_size: int, workspace_mib: int) -> float:
        tokens, total = sum(len(completion) for _, completion in batch), 0.0
        for first in range(0, len(batch), micro_batch_size):
            rows = batch[first : first + micro_batch_size]
            prompt_ids, prompt_mask = pad_left([p for p, _ in rows], self.pad_id, self.parameters[0].device)
            ids = [torch.tensor(c, device=prompt_ids.device) for _, c in rows]
            width = max(map(len, ids))
            completion_ids = pad_right(ids, width, self.pad_id)
            mask = pad_right([torch.ones_like(row) for row in ids], width, 0)
            with autocast():
                logps = score(
                    self.model,
                    prompt_ids,
                    prompt_mask,
                    completion_ids,
                    mask,
                    temperature=1.0,
                    workspace_mib=workspace_mib,
                    offload=self.offload(),
                ).logps
            loss = -logps.sum() / tokens
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total
