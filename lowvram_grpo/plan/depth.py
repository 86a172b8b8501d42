"""The same model with fewer of its layers, and from which layer on their kinds repeat."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def period_of(config: PretrainedConfig) -> int:
    """After how many layers their kinds repeat; all of them where they do not, or where some attend to others' keys
    (Gemma 4's last layers, which have no projections for these, and MLPs of another size)."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "num_kv_shared_layers", 0):
        return config.num_hidden_layers
    if not kinds:
        return 1
    return next(p for p in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[p:])))


def cut(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with its first `layers` layers alone."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shallow
