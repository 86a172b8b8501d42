"""Layers with a state beside attention: gated delta rules, Mamba-2, short convolutions, in passes by a layout.

Such a layer sees the tokens before its own only through what it has made of them: the last inputs of its convolution,
and a matrix a head. transformers' own layer reads both from a cache and writes them back, so a layout runs it on one
sequence, or on rows of one length, at a time, and hands over `States` where the layer looks for its cache. That needs
no code of ours for any kind of layer; which modules are such layers is known by what they ask of a cache.

A pass's layout comes to the layer by keyword. Some decoder layers do not hand keywords on (LFM2's before transformers
5.24); these hold the layout for what is inside of them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from lowvram_grpo.policy.own_forward import give_forward, has_foreign_forward, stands_in

# What a layer with a state calls of its cache, and what one with attention calls of transformers.
_STATEFUL = {"update_conv_state", "update_recurrent_state"}
_ATTENDING = {"ALL_ATTENTION_FUNCTIONS"}
# How transformers has called the argument over the versions.
_CACHE_NAMES = ("cache", "cache_params", "past_key_values")
_KEYWORD = "attention_layout"

# Whether several tokens at once may follow a state. Before, layers left the state out, or took it for one token's.
CONTINUES = "conv_kernel_size" in inspect.signature(LinearAttentionLayer.update_conv_state).parameters

# A layer's forward: hidden (B, L, H) and the states (B, ...) before it, which it replaces by those behind; (B, L, H).
Run = Callable[[Tensor, "States"], Tensor]


class StateKey(NamedTuple):
    """Which state of a layer: `kind` is `conv` or `recurrent`, `number` tells several of a kind apart."""

    kind: str
    number: int


class States:
    """The states of B sequences in one layer, in the guise of a cache of transformers' (of any version).

    Attributes:
        found: (B, ...) by key; empty where a sequence begins. A layer replaces its tensors, or writes into them where
            it is given a single token.
    """

    record_past = False  # of `layers[i]` before transformers 5.24

    def __init__(self, found: dict[StateKey, Tensor] | None = None):
        self.found = dict(found or {})

    def expanded(self, rows: int) -> States:
        """Those of one sequence, handed to so many."""
        return States({key: x.expand(rows, *x.shape[1:]).contiguous() for key, x in self.found.items()})

    # What layers ask for

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.found.get(StateKey("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.found.get(StateKey("recurrent", state_idx))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.found)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, new: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """`new` (B, C, L) inputs of a convolution over `conv_kernel_size` of them; with those before, (B, C, K + L).
        Without the size, as older layers call it, `new` are the last K or a single one; the last K."""
        key = StateKey("conv", state_idx)
        before = self.found.get(key)
        size = conv_kernel_size or (new if before is None else before).shape[-1]
        if before is None:
            seen = new if new.shape[-1] >= size else nn.functional.pad(new, (size - new.shape[-1], 0))
        else:
            seen = torch.cat([before.to(new.dtype), new], -1)
        self.found[key] = seen[..., -size:]
        return seen if conv_kernel_size else self.found[key]

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.found[StateKey("recurrent", state_idx)] = new
        return new

    # What they looked into before transformers 5.24

    @property
    def layers(self) -> _EveryLayer:
        return _EveryLayer(self)

    @property
    def conv_states(self) -> Any:
        return self._of("conv")

    @property
    def recurrent_states(self) -> Any:
        return self._of("recurrent")

    def _of(self, kind: str) -> Any:
        by_number = {key.number: x for key, x in self.found.items() if key.kind == kind}
        return by_number if CONTINUES else by_number.get(0)


class _EveryLayer:
    """`cache.layers`, each of which is the one that asks."""

    def __init__(self, states: States):
        self._states = states

    def __getitem__(self, index: int) -> States:
        return self._states


@cache
def _names_in(kind: type) -> frozenset[str]:
    """What the methods of a class mention."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for method in vars(base).values():
            code = getattr(inspect.unwrap(method), "__code__", None) if inspect.isfunction(method) else None
            found.update(code.co_names if code else ())
    return frozenset(found)


@cache
def _cache_name(kind: type) -> str | None:
    takes = inspect.signature(kind.forward).parameters
    return next((name for name in _CACHE_NAMES if name in takes), None)


@cache
def _takes_keywords(kind: type) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind.forward).parameters.values())


def recurrent_layers(decoder: nn.Module) -> list[nn.Module]:
    """The modules that keep a state of the tokens before, as many as there are."""
    return [m for m in decoder.modules() if _names_in(type(m)) & _STATEFUL and _cache_name(type(m)) is not None]


def attending_layers(decoder: nn.Module) -> list[nn.Module]:
    """The modules that call transformers' attention interface."""
    return [m for m in decoder.modules() if _names_in(type(m)) & _ATTENDING and hasattr(m, "layer_idx")]


def follow_layouts(decoder: nn.Module) -> str | None:
    """From now on layers with a state go by the layout that a pass is given; without one they do as ever. Where they
    cannot, why not, in a phrase for people."""
    layers = recurrent_layers(decoder)
    for layer in layers:
        if has_foreign_forward(layer):
            return f"something else runs its {type(layer).__name__}"
        if not isinstance(getattr(layer, "layer_idx", None), int):
            return "its layers do not say which they are"
    for layer in layers:
        give_forward(layer, _by_layout)
    deaf = {id(layer) for layer in layers if not _takes_keywords(type(layer))}
    for carrier in decoder.modules():
        if isinstance(carrier, GradientCheckpointingLayer) and deaf & {id(m) for m in carrier.modules()}:
            if has_foreign_forward(carrier):
                return f"something else runs its {type(carrier).__name__}"
            give_forward(carrier, _carrying)
    return None


def recomputed_with_layout(decoder: nn.Module) -> bool:
    """Whether activation checkpointing runs the layers again by the layout of the first time: it does not where a layer
    holds the layout outside of what is run again."""
    inside = "__call__" in vars(GradientCheckpointingLayer)
    return inside or all(_takes_keywords(type(layer)) for layer in recurrent_layers(decoder))


# Of the thread: a backward pass computes layers again in one of its own.
_held = threading.local()


@contextmanager
def _holding(layout: Any) -> Iterator[None]:
    before, _held.layout = getattr(_held, "layout", None), layout
    try:
        yield
    finally:
        _held.layout = before


@stands_in
def _carrying(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _holding(kwargs.get(_KEYWORD)):
        return type(self).forward(self, *args, **kwargs)


@stands_in
def _by_layout(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What stands in for the forward of a layer with a state."""
    layout = kwargs.pop(_KEYWORD, None) or getattr(_held, "layout", None)
    if layout is None:
        return type(self).forward(self, *args, **kwargs)
    hidden = args[0] if args else kwargs["hidden_states"]
    name = _cache_name(type(self))
    layout.recurrences += 1
    # Nothing else is handed on: the mask is the layout's, and positions are those of the whole pass.
    return layout.recur(self.layer_idx, hidden, lambda x, states: type(self).forward(self, x, **{name: states}))


def continued(run: Run, rows: Tensor, states: States) -> Tensor:
    """(B, L, H) of rows (B, L, H) that all follow the sequence of `states` (1, ...), differentiably: a single token,
    whose states a layer would overwrite, is followed by one of padding."""
    length = rows.shape[1]
    if length == 1:
        rows = torch.cat([rows, torch.zeros_like(rows)], 1)
    return run(rows, states.expanded(len(rows)))[:, :length]
