"""Attention of packed sequences by xformers, where it is asked for or known to win, and runs here.

Both packed layouts are the same to it: queries one sequence after another, keys likewise, each query sees the keys of
its own sequence up to its own place, counted from the end. A block-diagonal bias says that in two lists of lengths, so
nothing is padded and no mask is read.

    prompts of a prefill:      queries P1, P2, ...             keys P1, P2, ...
    a shared prompt's group:   queries P, T1, T2, ...          keys P, P + T1, P + T2, ...

Where it can win: sdpa takes FlashAttention from compute capability 8.0 on and only without a mask, else the
memory-efficient kernel with a mask as a tensor. xformers' `memory_efficient_attention_partial` and `merge_attentions`
would keep one copy of a prompt's keys, but what runs on Turing (`fmha.cutlass`) has no partial attention, and there is
no window between the parts; so keys are gathered (`policy/gather_kv.py`), one call does the rest, and its backward is
xformers' own. There heads must be as many for keys as for queries: grouped ones are known to forward passes alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram_grpo.errors import one_line
from lowvram_grpo.policy.attend import repeat_kv
from lowvram_grpo.policy.attention import AttentionParams, ranges
from lowvram_grpo.policy.gather_kv import KVCopies


class Case(NamedTuple):
    """What a kernel must be able to do: `training` asks for a backward pass, `windowed` for sliding windows."""

    device: torch.device
    dtype: torch.dtype
    head: int
    value_head: int
    training: bool
    windowed: bool


@lru_cache
def library() -> tuple[Any, str | None]:
    """xformers.ops, or why not, in words that follow "because"."""
    log = logging.getLogger("xformers")
    was, log.disabled = log.disabled, True  # what it would print is the answer below
    try:
        if importlib.util.find_spec("xformers") is None:
            return None, "it is not installed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("xformers.ops"), None
    except Exception as error:
        # Built for another PyTorch, it is ImportError, OSError, AttributeError: whatever breaks first.
        return None, f"its import fails ({type(error).__name__}: {one_line(error)})"
    finally:
        log.disabled = was


class Blocks(NamedTuple):
    """Sequences in a packed row: how many queries and keys each has, never fewer keys; `window` as in
    `AttentionParams`."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    window: int | None = None


def shared_blocks(groups: Sequence[tuple[int, Sequence[int]]]) -> tuple[Blocks, Tensor, list[KVCopies]]:
    """A packed row of groups that share their prompts, as sequences: each prompt, then each completion behind it.

    Args:
        groups: (tokens of the prompt, tokens of each completion); a completion of none has no sequence.

    Returns:
        the sequences, whose queries are the row as it is; (S,) int64 on the host, which token of the row is which key;
        the copies of each group's tokens, on the host.
    """
    queries, keys, index, copies = [], [], [], []
    begin = first_key = 0  # of the group, in the row and among the keys
    for prompt, completions in groups:
        kept = [n for n in completions if n]
        starts = accumulate(kept, initial=begin + prompt)
        queries += [prompt, *kept]
        keys += [prompt, *(prompt + n for n in kept)]
        index.append((begin, prompt))
        for start, n in zip(starts, kept):
            index += [(begin, prompt), (start, n)]
        firsts = list(accumulate((prompt + n for n in kept), initial=first_key + prompt))
        shared = ranges([(first, prompt) for first in (first_key, *firsts[:-1])])
        own = ranges([(first + prompt, n) for first, n in zip(firsts, kept)])
        copies.append(KVCopies(prompt, 1 + len(kept), shared, own))
        begin, first_key = begin + prompt + sum(kept), firsts[-1]
    return Blocks(tuple(queries), tuple(keys)), ranges(index), copies


def bias_of(ops: Any, blocks: Blocks, device: torch.device) -> Any:
    """xformers' bias for these sequences. Made on the host, and sent from pinned memory by xformers."""
    biases, window = ops.fmha.attn_bias, blocks.window
    if blocks.queries == blocks.keys:  # then both corners are the same, and the window has a backward in every operator
        bias = biases.BlockDiagonalCausalMask.from_seqlens(list(blocks.queries), device=device)
        return bias if window is None else bias.make_local_attention(window)
    of = biases.BlockDiagonalCausalFromBottomRightMask
    bias = of.from_seqlens(list(blocks.queries), list(blocks.keys), device=device)
    return bias if window is None else bias.make_local_attention_from_bottomright(window)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float, ops: Any = None) -> Tensor:
    """(1, L, heads, dv) of q (1, L, heads, d), k and v (1, S, KV heads, d), as many heads for keys as for queries or,
    without a gradient, fewer. The call for benchmarks, with `bias_of`."""
    ops, heads, shared = ops or library()[0], q.shape[2], k.shape[2]
    if heads == shared:
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    if not _takes_grouped_heads(q):
        k, v = (repeat_kv(x.transpose(1, 2), heads).transpose(1, 2) for x in (k, v))
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    repeats = heads // shared
    k, v = (x[:, :, :, None].expand(-1, -1, -1, repeats, -1) for x in (k, v))
    out = ops.memory_efficient_attention(q.unflatten(2, (shared, repeats)), k, v, attn_bias=bias, scale=scale)
    return out.flatten(2, 3)


def _takes_grouped_heads(q: Tensor) -> bool:
    """Whether FlashAttention runs it; the other kernel sends each group to a stream of its own."""
    return q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)


class Kernel(NamedTuple):
    """Attends by xformers where a layer can.

    Attributes:
        cases: those that were found to run here; no other is tried in the middle of a pass.
        training: for passes that may have a backward one.
    """

    cases: frozenset[Case]
    training: bool

    def on(self, blocks: Blocks, device: torch.device) -> Packed:
        """For the sequences of one layout."""
        return Packed(self, blocks, device)


class Packed:
    """A kernel on the sequences of one layout; biases are made once for all layers."""

    def __init__(self, kernel: Kernel, blocks: Blocks, device: torch.device):
        self.kernel, self.blocks, self.device = kernel, blocks, device
        self._biases: dict[int | None, Any] = {}

    def takes(self, query: Tensor, value: Tensor, params: AttentionParams) -> bool:
        """Whether it attends in this layer: query and value (1, heads, L, d) in the dtype of the attention.
        Soft-capping, sinks and dropout are left to `attend.py`."""
        windowed = self._window(params) is not None
        case = Case(query.device, query.dtype, query.shape[3], value.shape[3], self.kernel.training, windowed)
        plain = params.softcap is None and params.sinks is None and not params.dropout
        return plain and case in self.kernel.cases

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """As `packed_attention`."""
        window = self._window(params)
        if window not in self._biases:
            self._biases[window] = bias_of(library()[0], self.blocks._replace(window=window), self.device)
        return packed_attention(q, k, v, self._biases[window], params.scale)

    def _window(self, params: AttentionParams) -> int | None:
        return params.window if params.window is not None and params.window < max(self.blocks.keys) else None
