"""Our attention, registered with transformers under `NAME`: it attends by a layout where it is given one.

Decoders hand keyword arguments of their forward pass through to the attention of each layer, and activation
checkpointing hands them to the recomputation as well. So a layout object that comes with a pass decides who sees whom,
and where keys and values are kept, in every architecture that goes through transformers' attention interface. Without a
layout it is transformers' sdpa: a model may keep the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lowvram_grpo.errors import is_out_of_memory, one_line
from lowvram_grpo.policy.attend import attend_by_blocks, attend_causally
from lowvram_grpo.policy.recurrent import Run, attending_layers, follow_layouts, recurrent_layers

NAME = "lowvram"

# How far apart a pass by a layout and a plain one may be, of the norm, when a model is asked whether it fits: much more
# than 4-bit kernels for one row and for several are, much less than a wrong position, mask or state makes.
TOLERANCE = 0.1


class Unsupported(ValueError):
    """The model's attention does something that a layout does not know; the message is a phrase for people."""


class AttentionParams(NamedTuple):
    """What a layer asks of its attention: the factor on its scores, the share of weights to drop, how many tokens a
    token sees (itself included; None: all), c of scores c * tanh(score / c), and sinks (heads,), one more logit in each
    softmax, which gives nothing."""

    scale: float
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None = None


class Layout:
    """Who attends to whom in one pass, and whose states follow whose.

    Attributes:
        calls: how many layers have attended by this layout, recomputed ones included.
        recurrences: how many have carried a state on by it, likewise.
        windows: the sliding windows that those that attend were given.
    """

    def __init__(self):
        self.calls, self.recurrences, self.windows = 0, 0, set()
        self._owners: dict[int, tuple[ref[Tensor], int]] = {}

    def owner(self, layer: int, key: Tensor) -> int:
        """The number of the layer that keys are kept for: the first one of this pass that was given this very tensor.
        Layers that share keys (Gemma 4's last) hand it on, and one cache serves them all."""
        known, first = self._owners.get(id(key), (None, layer))
        if known is not None and known() is key:
            return first
        self._owners[id(key)] = ref(key), layer
        return layer

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Attention of query (B, heads, L, d) of layer number `layer` by its new key and value (B, KV heads, L, d);
        returns (B, L, heads, d)."""
        raise NotImplementedError

    def recur(self, layer: int, hidden: Tensor, run: Run) -> Tensor:
        """(B, L, H) of layer number `layer`, which keeps a state, for hidden (B, L, H); `run` is its forward on
        sequences of one length."""
        raise Unsupported("its layers keep a state")


def ranges(pairs: Sequence[tuple[int, int]]) -> Tensor:
    """(sum of lengths,) int64 on the host: start, start + 1, ... for each (start, length), one after another."""
    found = [torch.arange(start, start + n, device="cpu") for start, n in pairs]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long, device="cpu")


def attention_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which attention of tensors of `dtype` is computed: autocast's, where it is on."""
    if dtype != torch.float64 and device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    attention_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer."""
    if query.dtype != key.dtype and {query.dtype, key.dtype} == {torch.float16, torch.float32}:
        # Keys of another layer, of which one alone is kept in float32 (`overflow`).
        out, weights = _attention(
            module, query.to(key.dtype), key, value, attention_mask, dropout, scaling,
            attention_layout=attention_layout, **kwargs,
        )  # fmt: skip
        return out.to(query.dtype), weights
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if attention_layout is None:
        if softcap is not None or sinks is not None:
            params = AttentionParams(_scale(query, scaling), dropout, None, softcap, sinks)
            causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
            return _beyond_sdpa(query, key, value, attention_mask, params, causal).transpose(1, 2).contiguous(), None
        if query.is_meta:
            out = attend_causally(query, key, value, attention_mask, scale=scaling, dropout=dropout)
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if getattr(module, "layer_idx", None) is None or module.layer_idx < 0:
        raise Unsupported("its layers do not say which they are")
    if kwargs.get("position_bias") is not None:
        raise Unsupported("its attention has a position bias")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise Unsupported("its attention is not causal")
    params = AttentionParams(_scale(query, scaling), dropout, kwargs.get("sliding_window"), softcap, sinks)
    attention_layout.calls += 1
    attention_layout.windows.add(params.window)
    return attention_layout.attend(module.layer_idx, query, key, value, params).contiguous(), None


def _scale(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _beyond_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, params: AttentionParams, causal: bool) -> Tensor:
    """(B, heads, L, Dv) with soft-capping or sinks where there is no layout: transformers' sdpa would not know of
    them. Its conventions for a pass without a mask: one query sees all keys, several the keys of as many tokens."""
    dtype = attention_dtype(q.device, q.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    queries = q.shape[2]
    if mask is None and causal and queries > 1:
        k, v = k[:, :, :queries], v[:, :, :queries]
    elif mask is None:
        mask = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device)
    scale, dropout, _, softcap, sinks = params
    if softcap is None:
        return attend_causally(q, k, v, mask, scale=scale, dropout=dropout, sinks=sinks)
    return attend_by_blocks(q, k, v, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout, mask=mask)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def forward_with_layout(decoder: nn.Module, layout: Layout, positions: Tensor, **inputs: Tensor) -> Tensor:
    """(B, L, H) last hidden states of a pass by a layout, at positions (B, L). `inputs`: input_ids (B, L), or
    what `embeddings.host_inputs` makes of them. The attention must be set to `NAME`."""
    # A mask of four dimensions is handed through as it is, so no model spends time on making one.
    unused = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=positions.device)
    out = decoder(**inputs, attention_mask=unused, position_ids=positions, use_cache=False, attention_layout=layout)
    return out.last_hidden_state


@contextmanager
def layout_attention(decoder: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """The attention of all layers set to ours; back to what it was at the end, with `keep` only if the block fails."""
    configs = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    done = False
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
        done = True
    finally:
        if not (done and keep):
            for config, old in zip(configs, before):
                config._attn_implementation = old


def keep_caps(causal_lm: nn.Module) -> None:
    """Set our attention where a model's scores are capped and transformers would take sdpa all the same (before 5.24),
    which leaves the cap out: a token would not be scored as it was sampled."""
    config, decoder = causal_lm.config.get_text_config(), getattr(causal_lm, causal_lm.base_model_prefix)
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        with layout_attention(decoder, keep=True):
            pass


def layer_kinds(decoder: nn.Module) -> set[str]:
    """The kinds of attention that a decoder's layers have, by transformers' names."""
    return set(_kinds(decoder))


def _kinds(decoder: nn.Module) -> list[str]:
    return list(getattr(decoder.config.get_text_config(), "layer_types", None) or ["full_attention"])


# The second is what some configurations said for the first.
_KNOWN_KINDS = {"full_attention", "attention", "sliding_attention"}


def _unknown_kinds(decoder: nn.Module) -> set[str]:
    """Those that a layout knows nothing of: layers that attend in another way, or do neither that nor keep a state as
    transformers' caches know it."""
    states = {m.layer_idx for m in recurrent_layers(decoder)}
    attending = {getattr(m, "layer_idx", None) for m in attending_layers(decoder)}
    # Beside layers with a state some have neither, an MLP alone: there is nothing to know of those.
    return {
        kind
        for i, kind in enumerate(_kinds(decoder))
        if kind not in _KNOWN_KINDS and i not in states and (not states or i in attending)
    }


def head_sizes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """(KV heads, size of a head) of each layer whose keys are its own: not of Gemma 4's last ones, which attend to
    others' keys."""
    text = config.get_text_config()
    own = text.num_hidden_layers - getattr(text, "num_kv_shared_layers", 0)
    # Where layers differ, asking the whole configuration is an error of transformers.
    by_layer = getattr(text, "per_layer_config", None)
    layers = [text if by_layer is None else by_layer[i] for i in range(own)]
    return [
        (
            getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads,
            getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
        )
        for layer in layers
    ]


def check_calls(decoder: nn.Module, layout: Layout) -> None:
    """Raises Unsupported where a pass by `layout` went past the layout somewhere."""
    config, states = decoder.config.get_text_config(), len(recurrent_layers(decoder))
    expected = len(attending_layers(decoder)) if states else config.num_hidden_layers
    if layout.calls != expected:
        raise Unsupported(f"{layout.calls} of its {expected} layers attend by a given layout")
    if layout.recurrences != states:
        raise Unsupported(f"{layout.recurrences} of its {states} layers with a state go by a given layout")
    window = getattr(config, "sliding_window", None) if any("sliding" in k for k in _kinds(decoder)) else None
    if window is not None and window not in layout.windows:
        raise Unsupported("its layers do not say which of them have a sliding window")


class SupportCheck:
    """Whether models run in some way of ours, asked once a model.

    Args:
        attempt: runs some tokens through a decoder on a device, and raises where they do not come out right:
            Unsupported with a phrase for people, or whatever a model of some other kind makes of a layout.
    """

    def __init__(self, attempt: Callable[[nn.Module, torch.device], None]):
        self._attempt = attempt
        self._known: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()

    def reason_against(self, causal_lm: nn.Module) -> str | None:
        """In words that follow "because"; None where it fits. Memory that runs out is no answer, and raised."""
        if causal_lm not in self._known:
            self._known[causal_lm] = self._ask(causal_lm)
        return self._known[causal_lm]

    def _ask(self, causal_lm: nn.Module) -> str | None:
        decoder, kind = getattr(causal_lm, causal_lm.base_model_prefix), type(causal_lm).__name__
        others = _unknown_kinds(decoder)
        if others:
            return f"{kind} has layers of the kind {', '.join(sorted(others))}"
        if reason := follow_layouts(decoder):
            return f"{kind} does not fit it: {reason}"
        # Not that of what waits in host memory: an input embedding, or the layers of a streamed reference.
        places = [x.device for x in (*causal_lm.get_output_embeddings().buffers(), *decoder.parameters())]
        device = next((place for place in places if place.type != "cpu"), places[0])
        try:
            # What the asking pass will draw (an adapter's dropout) must not depend on whether it was the first to ask.
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                self._attempt(decoder, device)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return f"{kind} does not fit it: {one_line(error)}"
        return None
