"""The same model with fewer of its layers, and from which layer on their kinds repeat."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def period_of(config: PretrainedConfig) -> int:
    """After how many layers their kinds repeat; all of them where they do not."""
    kinds = _kinds(config)
    return next((p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[p:]))), 1)


def _kinds(config: PretrainedConfig) -> list[tuple]:
    """What tells decoder layers apart that are not alike: how they attend, whether they take an earlier layer's keys
    (Gemma 4), and whether they are dense where the others have experts (LFM2)."""
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [""] * layers
    keys = layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    dense = getattr(config, "num_dense_layers", None) or 0
    return [(kind, index >= keys, index < dense) for index, kind in enumerate(kinds)]


def cut(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with its first `layers` layers alone."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shallow
