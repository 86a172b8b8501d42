"""Per-token log-probs of completions: a decoder pass, then one sweep over the vocabulary for the scored tokens only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.kernels.linear_logps import linear_logps
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.load import unwrap


class Scores(NamedTuple):
    """(B, T) float32, 0 where masked; None where not asked for.

    Attributes:
        logps, kl: differentiable log-prob and exact KL to the reference.
        entropy, ref_logps: without gradient.
        rows: of the sweep, those that are scored.
        diffuse: how many of them took the dense product, None without a gradient.
        bound: the largest error that short lists can have left in a row of the gradient's direction, likewise.
    """

    logps: Tensor
    entropy: Tensor
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    rows: int = 0
    diffuse: int | None = None
    bound: Tensor | None = None


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


def scored_states(
    model: nn.Module,
    prompt_ids: Tensor,  # (B, P) left-padded
    prompt_mask: Tensor,  # (B, P)
    completion_ids: Tensor,  # (B, T) right-padded
    completion_mask: Tensor,  # (B, T)
) -> Tensor:
    """(N, H) the hidden state before each of the N unmasked completion tokens, row after row."""
    input_ids = torch.cat([prompt_ids, completion_ids], 1)
    attention_mask = torch.cat([prompt_mask, completion_mask.to(prompt_mask.dtype)], 1)
    hidden = last_hidden_state(model, input_ids, attention_mask)
    return hidden[:, prompt_ids.shape[1] - 1 : -1][completion_mask.bool()]


def score(
    model: nn.Module,
    prompt_ids: Tensor,  # (B, P) left-padded
    prompt_mask: Tensor,  # (B, P)
    completion_ids: Tensor,  # (B, T) right-padded
    completion_mask: Tensor,  # (B, T)
    *,
    temperature: float,
    workspace_mib: int,
    path: str | None = None,
    wanted: Tensor | None = None,  # (B, T) bool
    ref_states: Tensor | None = None,  # (N, H)
    kl: bool = False,
) -> Scores:
    """Log-prob and entropy of each completion token at `temperature`, under `model` with its adapter on or off.

    `wanted`, `path` and `kl` as in `linear_logps`; `ref_states` are the reference's `scored_states`, for a reference
    that has the model's own head.
    """
    mask = completion_mask.bool()
    out = linear_logps(
        scored_states(model, prompt_ids, prompt_mask, completion_ids, completion_mask),
        head_of(unwrap(model)),
        completion_ids[mask],
        temperature=temperature,
        entropy=True,
        workspace_mib=workspace_mib,
        ref_hidden=ref_states,
        kl=kl,
        wanted=None if wanted is None else wanted[mask],
        path=path,
    )
    blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    spread = lambda values: None if values is None else blank.masked_scatter(mask, values)
    return Scores(
        *map(spread, (out.logps, out.entropy, out.ref_logps, out.kl)),
        len(out.logps),
        None if out.diffuse is None else len(out.diffuse),
        None if out.bound is None or not len(out.bound) else out.bound.max(),
    )
