"""Whether a model decodes in our engine: asked once, by a few tokens."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import one_line
from lowvram_grpo.kernels.decode_attention import Rows
from lowvram_grpo.policy.attention import Unsupported, attention_set, check_calls, laid_out, layer_kinds
from lowvram_grpo.rollout.attention import DecodeLayout, PrefillLayout
from lowvram_grpo.rollout.cache import GroupCache

_REASONS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
# How far the two may be apart, of the norm: much more than 4-bit kernels for one row and for several are, much less
# than a wrong position or mask makes.
_TOLERANCE = 0.1


def why_not(causal_lm: nn.Module) -> str | None:
    """Why the model cannot decode in the engine, in words that follow "because"; None where it can.

    The first answer for a model costs three passes over some tokens. The model must be in eval mode.
    """
    if causal_lm not in _REASONS:
        _REASONS[causal_lm] = _probe(causal_lm)
    return _REASONS[causal_lm]


def _probe(causal_lm: nn.Module) -> str | None:
    kind = type(causal_lm).__name__
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    others = layer_kinds(decoder) - {"full_attention", "sliding_attention"}
    if others:
        return f"{kind} has layers of the kind {', '.join(sorted(others))}"
    device = next(causal_lm.get_output_embeddings().buffers(), next(decoder.parameters())).device
    ids = torch.arange(1, 6, device=device)[None] % causal_lm.config.get_text_config().vocab_size
    try:
        with torch.no_grad(), attention_set(decoder):
            ours = _decoded(decoder, ids)
        if ours.is_meta:
            return None
        with torch.no_grad():
            plain = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        apart = (ours.float() - plain.float()).norm() / plain.float().norm()
        if not apart <= _TOLERANCE:
            return f"{kind} decodes differently in the engine than in a plain pass (by {apart:.0%})"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever a model of some other kind makes of the layout: transformers knows how to sample from it.
        return f"{kind} does not fit it: {one_line(error)}"
    return None


def _decoded(decoder: nn.Module, ids: Tensor) -> Tensor:
    """(H,) hidden state of the last of `ids` (1, L), the others prefilled, as the second of two rows."""
    length, device = ids.shape[1], ids.device
    if length < 2:
        raise Unsupported("nothing to prefill")
    cache = GroupCache(1, length - 1, 2, 1)
    prefill = PrefillLayout(cache, [length - 1], [0])
    laid_out(decoder, prefill, prefill.positions(device), input_ids=ids[:, :-1])
    check_calls(decoder, prefill)
    at = lambda *values: torch.tensor(values, device=device)
    rows = Rows(at(0, 0), at(0, 0), at(length - 1), at([0, 1]), at(0, 1), length - 1, 1)
    decode = DecodeLayout(cache, rows)
    hidden = laid_out(decoder, decode, at([length - 1], [length - 1]), input_ids=ids[:, -1:].expand(2, 1))
    check_calls(decoder, decode)
    return hidden[1, 0]
