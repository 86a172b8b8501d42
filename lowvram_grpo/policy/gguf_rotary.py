"""What a GGUF file says of rotary embeddings, which transformers' older tables skip: without it a model loads, and
takes every token for one at another place.

* a part of each head is rotated (`rope.dimension_count`, of Phi-4-mini);
* longer contexts by slower rotation: linear (Gemma 3 from 4B on) and YaRN as keys, LongRoPE (Phi) as two tensors of
  divisors, Llama 3's as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Tensors that are read here and belong to no parameter.
TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def read_rotary(config: PretrainedConfig, reader: Any) -> None:
    """Write what the file open in `reader` says of rotary embeddings into its configuration, which transformers' older
    tables have made."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return
    ours = parameters.get("full_attention", parameters)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = _key(reader, "dimension_count")
    if rotated and rotated < size:
        ours["partial_rotary_factor"] = rotated / size
    before = _key(reader, "scaling.original_context_length")
    kind, factor = _key(reader, "scaling.type"), _key(reader, "scaling.factor")
    if kind in ("linear", "yarn") and factor not in (None, 1.0):
        ours |= {"rope_type": kind, "factor": factor} | ({"original_max_position_embeddings": before} if before else {})
    divisors = _tensors(reader)
    if {"rope_factors_long.weight", "rope_factors_short.weight"} <= divisors.keys():
        ours |= {f"{name}_factor": divisors[f"rope_factors_{name}.weight"].tolist() for name in ("long", "short")}
        ours["rope_type"] = "longrope"
        if before:
            ours["original_max_position_embeddings"] = config.original_max_position_embeddings = before


def scale_rotary(model: nn.Module, reader: Any) -> None:
    """Divide the frequencies of a model's rotary embeddings as Llama 3's files say."""
    divisors = _tensors(reader).get("rope_freqs.weight")
    for name, buffer in model.named_buffers() if divisors is not None else ():
        if name.endswith("inv_freq") and buffer.shape == divisors.shape:
            buffer.div_(divisors.to(buffer.device))


def _key(reader: Any, key: str) -> Any:
    from transformers.modeling_gguf_pytorch_utils import read_field

    found = read_field(reader, f"{read_field(reader, 'general.architecture')[0]}.rope.{key}")
    return found[0] if found else None


def _tensors(reader: Any) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    return {
        stored.name: torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        for stored in reader.tensors
        if stored.name in TENSORS
    }
