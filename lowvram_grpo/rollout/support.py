"""Whether a model decodes in our engine: asked once, by a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowvram_grpo.kernels.decode.attention import Rows
from lowvram_grpo.policy.attention import (
    TOLERANCE,
    SupportCheck,
    Unsupported,
    check_calls,
    forward_with_layout,
    layout_attention,
)
from lowvram_grpo.rollout.attention import DecodeLayout, PrefillLayout
from lowvram_grpo.rollout.cache import GroupCache


def why_not(causal_lm: nn.Module) -> str | None:
    """Why the model cannot decode in the engine, in words that follow "because"; None where it can.

    The first answer for a model costs four passes over some tokens. The model must be in eval mode.
    """
    return _SUPPORT.reason_against(causal_lm)


def _check_decoding(decoder: nn.Module, device: torch.device) -> None:
    ids = torch.arange(1, 6, device=device)[None] % decoder.config.get_text_config().vocab_size
    with layout_attention(decoder):
        ours = _decoded(decoder, ids)
    if ours.is_meta:
        return
    plain = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    apart = (ours.float() - plain.float()).norm() / plain.float().norm()
    if not apart <= TOLERANCE:
        raise Unsupported(f"it decodes differently in the engine than in a plain pass (by {apart:.0%})")


def _decoded(decoder: nn.Module, ids: Tensor) -> Tensor:
    """(H,) hidden state of the last of `ids` (1, L): all but two prefilled, those decoded in the second of two rows."""
    before, device = ids.shape[1] - 2, ids.device
    cache = GroupCache(1, before, 2, 2)
    prefill = PrefillLayout(cache, [before], [0])
    forward_with_layout(decoder, prefill, prefill.positions(device), input_ids=ids[:, :before])
    check_calls(decoder, prefill)
    cache.states.begin([(0, 0), (1, 0)])
    indices = lambda *values: torch.tensor(values, device=device)
    for age in range(2):
        rows = Rows(
            indices(0, 0), indices(age, age), indices(before), indices(0, 1)[None], indices(0, 1), before, age + 1
        )
        decode = DecodeLayout(cache, rows)
        positions = indices(before + age)[None].expand(2, 1)
        hidden = forward_with_layout(decoder, decode, positions, input_ids=ids[:, before + age][None].expand(2, 1))
        check_calls(decoder, decode)
    return hidden[1, 0]


_SUPPORT = SupportCheck(_check_decoding)
