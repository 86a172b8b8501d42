"""The time that a decode step cannot be faster than: the bytes it has to read over the bandwidth of the memory.

Every weight of the decoder and of the head once, as it is stored, with quantization constants and adapters; of the
embedding a few rows, which are left out. Of keys and values each prompt's once and each row's own, at half its length.
What else a step reads and writes is small beside that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timing import copy_ceiling, read_ceiling
from torch import Tensor, nn

from lowvram_grpo.policy.head import head_of


def weight_bytes(causal_lm: nn.Module) -> int:
    """Bytes of weights that a step reads."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in _read(causal_lm)}
    return sum(storages.values())


def _read(causal_lm: nn.Module) -> Iterator[Tensor]:
    embedding = {id(p) for p in causal_lm.get_input_embeddings().parameters()}
    for weight in getattr(causal_lm, causal_lm.base_model_prefix).parameters():
        if id(weight) not in embedding:
            yield weight
            state = getattr(weight, "quant_state", None)
            while state is not None:  # the constants may be quantized too
                yield state.absmax
                state = state.state2 if state.nested else None
    yield from head_of(causal_lm).flatten()[0]


def kv_bytes_a_token(causal_lm: nn.Module, item: float) -> float:
    """Bytes of keys and values of one token in all layers; `item` bytes a number."""
    config = causal_lm.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * item


def step_limit(causal_lm: nn.Module, tokens: float, item: float, bandwidth: float) -> tuple[float, dict[str, float]]:
    """Seconds of a step that reads the keys and values of so many tokens, `item` bytes a number, at `bandwidth` bytes a
    second; and what it reads, for a row."""
    weights, kv = weight_bytes(causal_lm), kv_bytes_a_token(causal_lm, item) * tokens
    parts = {"weights_mib": weights / 2**20, "kv_read_mib": kv / 2**20, "bandwidth_gbs": bandwidth / 1e9}
    return (weights + kv) / bandwidth, parts


def bandwidth(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes a second: the faster of a copy (read and written) and a sum (read) of a large tensor."""
    size = 2**30 if device.type == "cuda" else 2**28
    found = copy_ceiling(device, seconds, size), read_ceiling(device, seconds, size)
    return max(one["gbs"] for one in found) * 1e9
