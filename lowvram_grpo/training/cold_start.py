"""A few supervised steps on formatted references, so that GRPO has a reward to compare.

As in DeepSeek-R1's recipe (arXiv:2501.12948, section 2.3.1): where a model never writes the form that the rewards look
for, every group is dead and GRPO learns nothing. The same adapter is warmed up through the same model and the same
sweep; the loss is the mean negative log-prob of the reference's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lowvram_grpo.data.encoding import row_kwargs
from lowvram_grpo.errors import counted
from lowvram_grpo.policy.dropout import training_mode
from lowvram_grpo.rollout.batch import pad_left
from lowvram_grpo.training.experience import pad_right
from lowvram_grpo.training.scoring import score

REFERENCE_COLUMN = "reference_completion"
_PAIRS_PER_STEP = 8
# Fewer than one batch of references would be repeated in every step: the adapter learns them by heart, not their form.
FEWEST_REFERENCES = _PAIRS_PER_STEP
_MOST_REFERENCES = 5000


def reference_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a reference as a completion: the text and the end of the turn, which the text may hold already."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def fitting_references(
    data: Sequence[dict[str, Any]], tokenizer, *, limit: int, seed: int, notice: Callable[[str], None] | None
) -> list[int]:
    """Rows, in a random order, whose reference fits into `limit` tokens with its end token: one that is cut off would
    teach the model never to finish. At most _MOST_REFERENCES rows are looked at.

    Args:
        notice: hears how many do not fit.
    """
    if REFERENCE_COLUMN not in data[0]:
        return []
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [(i, text) for i in order[:_MOST_REFERENCES] if (text := data[i][REFERENCE_COLUMN])]
    if not rows:
        return []
    ids = tokenizer([text for _, text in rows], add_special_tokens=False)["input_ids"]
    fitting = [i for (i, _), tokens in zip(rows, ids) if len(tokens) < limit]
    long = len(rows) - len(fitting)
    if long and notice is not None:
        notice(
            f"{long} of {counted(len(rows), 'reference')} {'is' if long == 1 else 'are'} longer than "
            f"max_completion_length {limit}; a cold start leaves {'it' if long == 1 else 'them'} out."
        )
    return fitting


def batches_of(
    data: Sequence[dict[str, Any]], rows: list[int], tokenizer, encode: Callable[[list, list | None], list[list[int]]]
) -> Callable[[int], list[tuple[list[int], list[int]]]]:
    """The (prompt ids, completion ids) pairs of a step, given its index: `rows` of the data in turn, endless. `encode`
    makes ids of prompts and of what each brings for the chat template."""

    def batch(step: int) -> list[tuple[list[int], list[int]]]:
        first, count = step * _PAIRS_PER_STEP, min(_PAIRS_PER_STEP, len(rows))
        picked = [data[rows[(first + i) % len(rows)]] for i in range(count)]
        prompts = encode([row["prompt"] for row in picked], row_kwargs(picked))
        return [(prompt, reference_ids(tokenizer, row[REFERENCE_COLUMN])) for prompt, row in zip(prompts, picked)]

    return batch


def optimizer_class(optim: str) -> Callable[..., torch.optim.Optimizer]:
    """AdamW with moments as small as those of the run's own optimizer."""
    if "8bit" not in optim:
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


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
            prompt_ids, prompt_mask = pad_left([ids for ids, _ in rows], self.pad_id, self.parameters[0].device)
            ids = [torch.tensor(completion, device=prompt_ids.device) for _, completion in rows]
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
