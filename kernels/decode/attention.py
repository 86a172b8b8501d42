"""Attention of one new token a row to a prompt that its group shares and to the row's own tokens.

R rows decode at once; row r belongs to prompt slot s(r), whose P_s cached tokens are stored once for all its rows, and
has a_r own tokens cached before the new one. With query q, scale c, and both key sets side by side:

    out_r = softmax(c [ q_r . K_s[:P_s],  q_r . Ko_r[:a_r + 1] ]) [ V_s[:P_s] ; Vo_r[:a_r + 1] ]

The new key and value are first written to own[r, :, a_r]. Keys and values may be int8 with one float32 scale a head and
token; the scale of a key multiplies its score and that of a value its weight, so the products run on the integers.
Some channels of keys are a hundred times as large as others (Qwen2's, for their biases), and would leave these no bits:
an int8 cache holds k / z and meets q * z, where z, the spread, is a number a channel for each prompt (see `spread_of`).

Bytes read a step and layer: 2 d KVH item (sum_s P_s + sum_r a_r), where a cache without sharing reads
2 d KVH item sum_r (P_s(r) + a_r): the rows of a group are one matrix of G * heads / KVH queries a KV head.
`decode_attention_triton.py` has the kernels. Memory of the PyTorch path below, their reference and the CPU's: scores
(R, heads, P + a) float32, their weights, and a copy of what is int8.

Sources: grouped heads arXiv:2305.13245; shared prefixes arXiv:2402.05099 (Hydragen); scales moved from one factor to
the other arXiv:2211.10438 (SmoothQuant).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.decode.attention_triton import decode_attention_triton
from lowvram_grpo.kernels.decode.launch import decode_path
from lowvram_grpo.kernels.runtime import HAS_TRITON, trial
from torch import Tensor

from lowvram_grpo.errors import is_out_of_memory

_LARGEST = 127.0


class KV(NamedTuple):
    """Keys (N, KVH, L, D) and values (N, KVH, L, Dv) of N slots; of int8, with float32 scales (N, KVH, L)."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def quantized(self) -> bool:
        return self.key_scales is not None

    def first(self, n: int) -> KV:
        """Views of the first n slots."""
        return KV(*(None if x is None else x[:n] for x in self))


@dataclass
class Rows:
    """Who attends to what in one step. Index tensors are int64, on the device of the cache.

    Attributes:
        slot: (R,) prompt slot of each row.
        age: (R,) own tokens cached before the new one, which is where its key and value go.
        prefix: (S,) cached tokens of each prompt slot.
        members: (S, M) the rows of each prompt slot, -1 behind the last.
        rank: (R,) place of the row among the members of its slot; -1 for a row that nobody waits for: it takes part in
            no prefix, and its output means nothing.
        longest_prefix, longest_own: no prefix and no age + 1 is longer; what the PyTorch path reads.
        even: every prefix is longest_prefix and every age longest_own - 1, so that without a window nothing is masked.
        regular: row r is member r % M of slot r // M, so that groups are views.
    """

    slot: Tensor
    age: Tensor
    prefix: Tensor
    members: Tensor
    rank: Tensor
    longest_prefix: int
    longest_own: int
    even: bool = False
    regular: bool = False
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict, repr=False)

    def grouped(self, x: Tensor) -> Tensor:
        """(S, M, ...) of per-row (R, ...); places without a row repeat some other one."""
        return x.unflatten(0, self.members.shape) if self.regular else x[self.members.clamp(min=0)]

    def ungrouped(self, x: Tensor) -> Tensor:
        """(R, ...) of (S, M, ...)."""
        return x.flatten(0, 1) if self.regular else x[self.slot, self.rank.clamp(min=0)]

    def mask(self, window: int | None) -> Tensor | None:
        """(R, 1, 1, longest_prefix + longest_own) bool: the keys that each row sees; None for all. A window lets the
        new token see `window` tokens, itself included. Made once a step and kind of layer."""
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> Tensor | None:
        if window is not None and window >= self.longest_prefix + self.longest_own:
            window = None
        if self.even and window is None:
            return None
        before, age = self.prefix[self.slot][:, None], self.age[:, None]
        prefix = torch.arange(self.longest_prefix, device=age.device)[None]
        own = torch.arange(self.longest_own, device=age.device)[None]
        sees = torch.cat([(prefix < before).expand(len(age), -1), own <= age], 1)
        if window is not None:
            position = torch.cat([prefix.expand(len(age), -1), before + own], 1)
            sees &= position > before + age - window
        return sees[:, None, None]


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (..., D) and float32 scales (...) of x (..., D): symmetric, the largest magnitude is 127."""
    x = x.float()
    # Not a division: on a GPU PyTorch would make it this product, on a CPU not.
    scales = x.abs().amax(-1).mul_(1 / _LARGEST)
    codes = (x / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round_().clamp_(-_LARGEST, _LARGEST)
    return codes.to(torch.int8), scales


def spread_of(keys: Tensor) -> Tensor:
    """float32 (KVH, D) z of a prompt's keys (KVH, L, D): max_t |k|^0.75, and at least a thousandth of the largest's.

    The exponent was chosen on GSM8K: mean |logp - logp without rounding| of Qwen2.5-Coder-0.5B is 0.098 without z,
    0.019 with 0.5, 0.011 with 0.75, 0.016 with 1, and of SmolLM2-135M 0.036, 0.017, 0.016, 0.018.
    """
    largest = keys.float().abs().amax(1)
    floor = largest.amax(1, keepdim=True).mul_(1e-3).clamp_(min=torch.finfo(torch.float32).tiny)
    return largest.maximum(floor).pow_(0.75)


def write(cache: KV, index: tuple, key: Tensor, value: Tensor) -> None:
    """Put keys (..., D) and values (..., Dv) to where `index` points in the slots, heads and tokens of the cache."""
    if not cache.quantized:
        cache.keys[index], cache.values[index] = key.to(cache.keys.dtype), value.to(cache.values.dtype)
        return
    cache.keys[index], cache.key_scales[index] = quantize_kv(key)
    cache.values[index], cache.value_scales[index] = quantize_kv(value)


def append(own: KV, rows: Rows, key: Tensor, value: Tensor) -> None:
    """Write the new keys (R, KVH, D) and values (R, KVH, Dv) behind each row's own."""
    n = len(key)
    if rows.even:
        write(own, (slice(0, n), slice(None), rows.longest_own - 1), key, value)
    else:
        row = torch.arange(n, device=key.device)[:, None]
        head = torch.arange(key.shape[1], device=key.device)[None]
        write(own, (row, head, rows.age[:, None]), key, value)


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
        spread: float32 (N, KVH, D), z of each prompt slot; the keys of `prompts` and `own` have been divided by it.
        path: see `decode_launch.decode_path`. On meta tensors only bytes count: those of a GPU unless it is "torch".

    The Triton path reads sizes on the device and can be captured in a CUDA graph; the PyTorch path takes them from
    rows.longest_prefix and rows.longest_own.
    """
    if spread is not None:
        z = spread[rows.slot]  # (R, KVH, D)
        key = key / z
        query = (query.unflatten(1, (key.shape[1], -1)) * z[:, :, None]).flatten(1, 2).to(query.dtype)
    if usable_path(query, key, value, path) == "triton":
        return decode_attention_triton(
            query, key, value, prompts, own, rows, scale=scale, window=window, softcap=softcap
        )
    append(own, rows, key, value)
    return decode_attention_ref(
        query, prompts, own.first(len(query)), rows, scale=scale, window=window, softcap=softcap
    )


def usable_path(query: Tensor, key: Tensor, value: Tensor, path: str | None = None) -> str:
    """`decode_path` for these (R, heads, D) tensors, where Triton's was not asked for only if it works here."""
    found = decode_path(query.device, query.shape[1], key.shape[1], query.shape[2], value.shape[2], path)
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


def decode_attention_ref(
    query: Tensor,
    prompts: KV,
    own: KV,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The PyTorch path; the new keys and values are in `own` (R slots) already."""
    r, heads = query.shape[:2]
    p, t = rows.longest_prefix, rows.longest_own
    slots, kv_heads = len(rows.prefix), own.keys.shape[1]
    query = query.unflatten(1, (kv_heads, -1)) * scale  # (R, KVH, heads / KVH, D)
    scores = _scores(query, own, r, t)
    if p:
        # The queries of a group, (S, KVH, M * heads / KVH, D), meet each key of their prompt once.
        group = rows.grouped(query).transpose(1, 2)
        shared = _scores(group.flatten(2, 3), prompts, slots, p)
        shared = rows.ungrouped(shared.unflatten(2, group.shape[2:4]).transpose(1, 2))
        scores = torch.cat([shared, scores], 3)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    mask = rows.mask(window)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    weights = scores.softmax(3)
    out = _weighted(weights[..., p:], own, r, t, query.dtype)
    if p:
        shared = rows.grouped(weights[..., :p]).transpose(1, 2)
        part = _weighted(shared.flatten(2, 3), prompts, slots, p, query.dtype)
        out = out + rows.ungrouped(part.unflatten(2, shared.shape[2:4]).transpose(1, 2))
    return out.reshape(r, heads, -1)


def _scores(query: Tensor, cache: KV, n: int, length: int) -> Tensor:
    """(N, KVH, m, length) float32 products of queries (N, KVH, m, D) with the first `length` keys."""
    keys = cache.keys[:n, :, :length].transpose(2, 3)
    if cache.key_scales is None:
        return (query @ keys.to(query.dtype)).float()
    # float16 would not hold the products before their scale.
    return query.float() @ keys.float() * cache.key_scales[:n, :, None, :length]


def _weighted(weights: Tensor, cache: KV, n: int, length: int, dtype: torch.dtype) -> Tensor:
    """(N, KVH, m, Dv) sums of the first `length` values under weights (N, KVH, m, length)."""
    if cache.value_scales is not None:
        weights = weights * cache.value_scales[:n, :, None, :length]
    return weights.to(dtype) @ cache.values[:n, :, :length].to(dtype)
