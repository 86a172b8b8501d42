"""Per-token log-probs of completions: a decoder pass, then one sweep over the vocabulary for the scored tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.kernels.linear_logps import linear_logps
from lowvram_grpo.memory.host import upload
from lowvram_grpo.memory.ledger import counted_as
from lowvram_grpo.policy.attention import ranges
from lowvram_grpo.policy.attention_choice import kernel_of
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.offload import offloaded_activations
from lowvram_grpo.policy.shared_prefix import PrefixLayout, packed_states, why_not
from lowvram_grpo.policy.wrapper import unwrap


class Scores(NamedTuple):
    """(B, T) float32, 0 where masked; None where not asked for.

    Attributes:
        logps, kl: differentiable log-prob and exact KL to the reference.
        entropy: differentiable with `entropy_gradient`.
        ref_logps: without gradient.
        rows: of the sweep, those that are scored.
        diffuse: how many of them took the dense product, None without a gradient.
        bound: the largest error that short lists can have left in a row of the gradient's direction, likewise.
        aux_loss: differentiable scalar, the micro-batch's share of a router's load-balancing loss, without its
            coefficient; the learner fills it in.
    """

    logps: Tensor
    entropy: Tensor
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    rows: int = 0
    diffuse: int | None = None
    bound: Tensor | None = None
    aux_loss: Tensor | None = None


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, L) positions that skip the padding on the left: a padded row sees the positions it would see alone."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def last_hidden_state(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, offload: bool = False) -> Tensor:
    """(B, L, H) after the final norm, without touching the head. `offload`: activations wait in host memory."""
    places = position_ids(attention_mask)
    if input_ids.is_meta:
        # Attention is counted as CUDA's kernels do it. Transformers cannot look into a mask here, but this is what it
        # makes of one with padding.
        why_not(model)
        b, length = input_ids.shape
        attention_mask = torch.empty(b, 1, length, length, dtype=torch.bool, device="meta")
    decoder = _decoder(model)
    with offloaded_activations(offload, _weights(decoder)):
        out = decoder(input_ids=input_ids, attention_mask=attention_mask, position_ids=places, use_cache=False)
    return out.last_hidden_state


def _weights(decoder: nn.Module) -> Iterator[Tensor]:
    return chain(decoder.parameters(), decoder.buffers())


def _decoder(model: nn.Module) -> nn.Module:
    causal_lm = unwrap(model)
    return getattr(causal_lm, causal_lm.base_model_prefix)


def scored_states(
    model: nn.Module,
    prompt_ids: Tensor,  # (B, P) left-padded
    prompt_mask: Tensor,  # (B, P)
    completion_ids: Tensor,  # (B, T) right-padded
    completion_mask: Tensor,  # (B, T)
    *,
    prompt_lengths: list[int] | None = None,
    completion_lengths: list[int] | None = None,
    group_sizes: list[int] | None = None,
    attention: str = "auto",
    offload: bool = False,
) -> Tensor:
    """(N, H) the hidden state before each of the N unmasked completion tokens, row after row.

    Lengths are those that the masks say; given, no pass waits for the GPU to count, and tensors may be on meta.
    With `group_sizes`, runs of adjacent rows that share a prompt, each prompt goes through the model once: ask
    `policy.shared_prefix.shared_groups` whether the model can; what attends there is `attention` (`auto`, `sdpa`,
    `xformers`). `offload`: activations wait in host memory.
    """
    lengths = prompt_lengths, completion_lengths, group_sizes
    places = _places(model, prompt_ids, prompt_mask, completion_mask, *lengths, attention)
    return _states(model, prompt_ids, prompt_mask, completion_ids, completion_mask, places, offload)


class _Places(NamedTuple):
    """Where the N tokens are that are scored, int64 (N,): the states before them in the flattened pass, and they
    themselves in the flattened completions."""

    layout: PrefixLayout | None
    states: Tensor
    targets: Tensor


def _places(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_mask: Tensor,
    prompt_lengths: list[int] | None,
    completion_lengths: list[int] | None,
    group_sizes: list[int] | None,
    attention: str,
) -> _Places:
    p, t, device = prompt_ids.shape[1], completion_mask.shape[1], prompt_ids.device
    lengths = _lengths(completion_mask, completion_lengths)
    if group_sizes is None:
        both = [
            ranges([(i * step + start, n) for i, n in enumerate(lengths)]) for start, step in ((p - 1, p + t), (0, t))
        ]
        return _Places(None, *upload(both, device))
    prompts = _lengths(prompt_mask, prompt_lengths)
    # Asked here: nothing is tried in the middle of a pass, whose layers may be checkpointed.
    kernel = kernel_of(attention, "training", _decoder(model), device)
    layout = PrefixLayout(prompts, lengths, group_sizes, width=p + t, prompt_width=p, device=device, kernel=kernel)
    return _Places(layout, layout.scored, layout.targets)


def _states(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    places: _Places,
    offload: bool,
) -> Tensor:
    input_ids = torch.cat([prompt_ids, completion_ids], 1)
    if places.layout is not None:
        decoder = _decoder(model)
        with offloaded_activations(offload, _weights(decoder)):
            return packed_states(decoder, input_ids, places.layout)[places.states]
    attention_mask = torch.cat([prompt_mask, completion_mask.to(prompt_mask.dtype)], 1)
    return last_hidden_state(model, input_ids, attention_mask, offload=offload).flatten(0, 1)[places.states]


def _lengths(mask: Tensor, known: list[int] | None) -> list[int]:
    return mask.sum(1).tolist() if known is None else known


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
    entropy_gradient: bool = False,
    prompt_lengths: list[int] | None = None,
    completion_lengths: list[int] | None = None,
    group_sizes: list[int] | None = None,
    attention: str = "auto",
    offload: bool = False,
) -> Scores:
    """Log-prob and entropy of each completion token at `temperature`, under `model` with its adapter on or off.

    `wanted`, `path`, `kl` and `entropy_gradient` as in `linear_logps`; `ref_states` are the reference's
    `scored_states`, for a reference that has the model's own head. Lengths, `group_sizes`, `attention` and `offload` as
    in `scored_states`.
    """
    shape = completion_ids.shape
    lengths = prompt_lengths, completion_lengths, group_sizes
    places = _places(model, prompt_ids, prompt_mask, completion_mask, *lengths, attention)
    scored = places.targets
    states = _states(model, prompt_ids, prompt_mask, completion_ids, completion_mask, places, offload)
    with counted_as("workspace"):
        out = linear_logps(
            states,
            head_of(unwrap(model)),
            completion_ids.flatten()[scored],
            temperature=temperature,
            entropy=True,
            entropy_gradient=entropy_gradient,
            workspace_mib=workspace_mib,
            ref_hidden=ref_states,
            kl=kl,
            wanted=None if wanted is None else wanted.flatten()[scored],
            path=path,
        )
    blank = torch.zeros(shape.numel(), dtype=torch.float32, device=completion_ids.device)
    spread = lambda values: None if values is None else blank.index_copy(0, scored, values).view(shape)
    return Scores(
        *map(spread, (out.logps, out.entropy, out.ref_logps, out.kl)),
        len(out.logps),
        None if out.diffuse is None else len(out.diffuse),
        None if out.bound is None or not len(out.bound) else out.bound.max(),
    )
