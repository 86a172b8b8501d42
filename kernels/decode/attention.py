"""Attention of one new token a row to a prompt that its group shares and to the row's own tokens.

R rows decode at once; row r belongs to prompt slot s(r), whose P_s cached tokens are stored once for all its rows, and
has a_r own tokens cached before the new one. With query q, scale c, and both key sets side by side:

    out_r = softmax(c [ q_r . K_s[:P_s],  q_r . Ko_r[:a_r + 1] ]) [ V_s[:P_s] ; Vo_r[:a_r + 1] ]

The new key and value are first written to own[r, :, a_r]. Keys and values may be int8 with one float32 scale a head and
token; the scale of a key multiplies its score and that of a value its weight, so the products run on the integers.
Some channels of keys are a hundred times as large as others (Qwen2's, for their biases), and would leave these no bits:
an int8 cache holds k / z and meets q * z, where z, the spread, is a number a channel for each prompt (`kv.spread_of`).

Bytes read a step and layer: 2 d KVH item (sum_s P_s + sum_r a_r), where a cache without sharing reads
2 d KVH item sum_r (P_s(r) + a_r): the rows of a group are one matrix of G * heads / KVH queries a KV head.
`attention_triton.py` launches the kernels of `attention_kernels.py`; `attention_ref.py` is the same in PyTorch.

Sources: grouped heads arXiv:2305.13245; shared prefixes arXiv:2402.05099 (Hydragen); scales moved from one factor to
the other arXiv:2211.10438 (SmoothQuant).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from lowvram_grpo.kernels.decode.attention_ref import decode_attention_ref
from lowvram_grpo.kernels.decode.attention_triton import decode_attention_triton
from lowvram_grpo.kernels.decode.kv import KV, Rows, append
from lowvram_grpo.kernels.decode.launch import decode_path
from lowvram_grpo.kernels.runtime import HAS_TRITON, trial
from torch import Tensor

from lowvram_grpo.errors import is_out_of_memory


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: KV,
    own: KV,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    spread: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Append the new keys and values, then attend: (R, heads, Dv) of the dtype of `query`.

    Args:
        query: (R, heads, D).
        key, value: (R, KVH, D) and (R, KVH, Dv) of the new tokens.
        prompts: of at least S slots.
        own: of at least R rows.
        window: how many tokens a token sees, itself included.
        softcap: c of scores c * tanh(score / c) (Gemma 2).
        sinks: (heads,), one more logit in the softmax of each head, which gives nothing (gpt-oss).
        spread: float32 (N, KVH, D), z of each prompt slot; the keys of `prompts` and `own` have been divided by it.
        path: see `launch.decode_path`. On meta tensors only bytes count: those of a GPU unless it is "torch".

    The Triton path reads sizes on the device and can be captured in a CUDA graph; the PyTorch path takes them from
    rows.longest_prefix and rows.longest_own.
    """
    if spread is not None:
        z = spread[rows.slot]  # (R, KVH, D)
        key = key / z
        query = (query.unflatten(1, (key.shape[1], -1)) * z[:, :, None]).flatten(1, 2).to(query.dtype)
    if usable_path(query, key, value, path) == "triton":
        return decode_attention_triton(
            query, key, value, prompts, own, rows, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    append(own, rows, key, value)
    return decode_attention_ref(
        query, prompts, own.first(len(query)), rows, scale=scale, window=window, softcap=softcap, sinks=sinks
    )


def usable_path(query: Tensor, key: Tensor, value: Tensor, path: str | None = None) -> str:
    """`decode_path` for these (R, heads, D) tensors, where Triton's was not asked for only if it works here."""
    heads, kv_heads = query.shape[1], key.shape[1]
    found = decode_path(query.device, heads, kv_heads, query.shape[2], value.shape[2], path, query.dtype)
    if path is None and found == "triton" and query.is_cuda and not _works(query.device, query.dtype):
        return "torch"
    return found


def settle(device: torch.device, dtypes: Iterable[torch.dtype]) -> None:
    """Find out now whether Triton works on `device` for queries of these dtypes: a step that is being captured, or
    watched for operations that wait, is no place to compile and try a kernel."""
    if device.type == "cuda" and HAS_TRITON:
        for dtype in dtypes:
            _works(device, dtype)


@trial
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton compiles the kernels here, which takes more than an import: a C compiler, a ptxas that knows the
    card."""
    make = lambda *shape: torch.zeros(*shape, dtype=dtype, device=device)
    # Made on the device: a copy of a Python number would wait.
    at = lambda value: torch.full((1,), value, dtype=torch.long, device=device)
    rows = Rows(at(0), at(0), at(1), at(0)[None], at(0), 1, 1)
    try:
        decode_attention(
            make(1, 1, 64), make(1, 1, 64), make(1, 1, 64), KV(make(1, 1, 1, 64), make(1, 1, 1, 64)),
            KV(make(1, 1, 1, 64), make(1, 1, 1, 64)), rows, scale=1.0, path="triton",
        )  # fmt: skip
    except Exception as error:  # of Triton, its compiler or its driver
        if is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"Triton does not work here ({said}), so rollouts decode by PyTorch's operators, without CUDA graphs, "
            "which is slower.",
            stacklevel=2,
        )
        return False
    return True
