"""Per-token log-probs of completions: a decoder pass, then one sweep over the vocabulary for the scored tokens only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.kernels.linear_logps import linear_logps
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.load import unwrap


class Scores(NamedTuple):
    """(B, T) float32, 0 where masked. `logps` is differentiable, `entropy` is not."""

    logps: Tensor
    entropy: Tensor


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, L) positions that skip the padding on the left: a padded row sees the positions it would see alone."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def last_hidden_state(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, L, H) after the final norm, without touching the head."""
    causal_lm = unwrap(model)
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    out = decoder(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
    )
    return out.last_hidden_state


def score(
    model: nn.Module,
    prompt_ids: Tensor,  # (B, P) left-padded
    prompt_mask: Tensor,  # (B, P)
    completion_ids: Tensor,  # (B, T) right-padded
    completion_mask: Tensor,  # (B, T)
    *,
    temperature: float,
    workspace_mib: int,
) -> Scores:
    """Log-prob and entropy of each completion token at `temperature`, under `model` with its adapter on or off."""
    mask = completion_mask.bool()
    input_ids = torch.cat([prompt_ids, completion_ids], 1)
    attention_mask = torch.cat([prompt_mask, completion_mask.to(prompt_mask.dtype)], 1)
    hidden = last_hidden_state(model, input_ids, attention_mask)
    hidden = hidden[:, prompt_ids.shape[1] - 1 : -1][mask]  # (N, H): the state before each scored token
    out = linear_logps(
        hidden,
        head_of(unwrap(model)),
        completion_ids[mask],
        temperature=temperature,
        entropy=True,
        workspace_mib=workspace_mib,
    )
    blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return Scores(blank.masked_scatter(mask, out.logps), blank.masked_scatter(mask, out.entropy))
