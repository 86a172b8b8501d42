"""What a rollout returns: prompts, completions and how likely they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RolloutBatch:
    """B = prompts * G completions, those of one prompt adjacent. Lists are ragged: nothing is padded.

    Attributes:
        prompt_ids: one list a completion (a group shares the list).
        completion_ids: the sampled ids, the end token included where one was drawn. Training uses these very ids.
        sampling_per_token_logps: float32 (T_i,) log-probs at the sampling temperature, before any filter; NaN where
            another sampler could give none.
        truncated: True where the length limit, not an end token, stopped the completion.
        tool_mask: of conversations: 1 for each sampled token and 0 for each inserted one, whose log-prob is 0 here.
            None: all are sampled.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    sampling_per_token_logps: list[Tensor]
    truncated: list[bool]
    tool_mask: list[list[int]] | None = None

    @property
    def sampled_lengths(self) -> list[int]:
        """Sampled tokens of each completion; what was inserted is none."""
        if self.tool_mask is None:
            return [len(ids) for ids in self.completion_ids]
        return [sum(mask) for mask in self.tool_mask]

    @property
    def sampled_ids(self) -> list[list[int]]:
        """Those tokens."""
        if self.tool_mask is None:
            return self.completion_ids
        return [[i for i, by_model in zip(*row) if by_model] for row in zip(self.completion_ids, self.tool_mask)]

    @property
    def stop_reasons(self) -> list[str]:
        """`stop` (an end token) or `length`, one a completion."""
        return ["length" if cut else "stop" for cut in self.truncated]

    def append(self, prompt: list[int], ids: list[int], logps: Tensor, ends: set[int]) -> None:
        """Add a completion, cut behind its first end token. `logps` (>= len(ids),) float32."""
        stop = next((t for t, token in enumerate(ids) if token in ends), None)
        length = len(ids) if stop is None else stop + 1
        self.prompt_ids.append(prompt)
        self.completion_ids.append(ids[:length])
        self.sampling_per_token_logps.append(logps[:length])
        self.truncated.append(stop is None)


def pad_left(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask
