"""Who attends to whom while completions are sampled, and whose states follow whose: prompts among themselves, then one
token a row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lowvram_grpo.kernels.decode.attention import decode_attention, usable_path
from lowvram_grpo.kernels.decode.kv import Rows
from lowvram_grpo.memory.host import upload
from lowvram_grpo.policy.attend import attend_by_blocks, attend_causally, causal_bias, repeat_kv
from lowvram_grpo.policy.attention import (
    AttentionParams,
    Layout,
    attention_dtype,
    ranges,
)
from lowvram_grpo.policy.recurrent import Run, States
from lowvram_grpo.policy.xformers_attention import Blocks, Kernel, Packed
from lowvram_grpo.rollout.cache import GroupCache


class PrefillLayout(Layout):
    """One packed row (1, L) of prompts, one after another without padding, each written to its slot of the cache.

    Args:
        lengths: tokens of each prompt.
        slots: of the cache, one a prompt.
        kernel: attends where it can, sdpa elsewhere.
    """

    def __init__(self, cache: GroupCache, lengths: Sequence[int], slots: Sequence[int], kernel: Kernel | None = None):
        super().__init__()
        self.cache, self.slots, self.kernel = cache, slots, kernel
        self.blocks = Blocks(tuple(lengths), tuple(lengths))
        ends = list(accumulate(lengths))
        self.spans = list(zip([0, *ends[:-1]], ends))
        self._packed: Packed | None = None
        self._biases: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def positions(self, device: torch.device) -> Tensor:
        """(1, L) int64."""
        return upload([ranges([(0, b - a) for a, b in self.spans])], device)[0][None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        owner = self.owner(layer, key)
        layer_cache = self.cache.layer(owner, key, value)
        for slot, (a, b) in zip(self.slots, self.spans) if owner == layer else ():
            layer_cache.keep_prompt(slot, key[0, :, a:b], value[0, :, a:b])
        dtype = attention_dtype(query.device, query.dtype)
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if self.kernel is not None:
            self._packed = self._packed or self.kernel.on(self.blocks, query.device)
            if self._packed.takes(query, value, params):
                return self._packed(*(x.transpose(1, 2) for x in (query, key, value)), params)
        if params.softcap is None:  # for all prompts at once
            key, value = (repeat_kv(x, query.shape[1]) for x in (key, value))
        outs = [self._causal(*(x[:, :, a:b] for x in (query, key, value)), params) for a, b in self.spans]
        return torch.cat(outs, 2).transpose(1, 2)

    def recur(self, layer: int, hidden: Tensor, run: Run) -> Tensor:
        # Prompts of one length go together, the others one by one: padding would be part of a state.
        outs: dict[int, Tensor] = {}
        for length in dict.fromkeys(self.blocks.queries):
            same = [i for i, (a, b) in enumerate(self.spans) if b - a == length]
            parts = [hidden[:, slice(*self.spans[i])] for i in same]
            states = States()
            out = run(torch.cat(parts) if len(parts) > 1 else parts[0], states)
            self.cache.states.keep_prompts(layer, [self.slots[i] for i in same], states)
            outs.update(zip(same, out))
        return torch.cat([outs[i] for i in range(len(self.spans))])[None]

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """(1, heads, L, Dv) of one prompt."""
        length = q.shape[2]
        window = None if params.window is None or params.window >= length else params.window
        if params.softcap is not None:
            return attend_by_blocks(
                q, k, v, scale=params.scale, softcap=params.softcap, sinks=params.sinks, window=window
            )
        bias = None
        if window is not None:
            case = length, window, q.dtype  # layers may differ in it (`policy.overflow`)
            if case not in self._biases:
                self._biases[case] = causal_bias(0, length, window, q.dtype, q.device)
            bias = self._biases[case]
        return attend_causally(q, k, v, bias, scale=params.scale, sinks=params.sinks)


class DecodeLayout(Layout):
    """One new token a row: (R, 1) of them.

    Args:
        path: of the kernel, see `decode_attention`.
        frozen: (R,) bool, rows whose states stay as they are; None: of none.

    Attributes:
        fixed: every layer so far read its sizes on the device, as a CUDA graph needs it.
    """

    def __init__(self, cache: GroupCache, rows: Rows, path: str | None = None, frozen: Tensor | None = None):
        super().__init__()
        self.cache, self.rows, self.path, self.frozen, self.fixed = cache, rows, path, frozen, True

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        # Of shared keys each layer writes the new token, the same numbers to the same place.
        layer_cache = self.cache.layer(self.owner(layer, key), key, value)
        q, k, v = (x[:, :, 0] for x in (query, key, value))
        path = usable_path(q, k, v, self.path)
        self.fixed &= path == "triton"
        out = decode_attention(
            q, k, v, layer_cache.prompts, layer_cache.own, self.rows,
            scale=params.scale, window=params.window, softcap=params.softcap, sinks=params.sinks,
            spread=layer_cache.spread, path=path,
        )  # fmt: skip
        return out[:, None]

    def recur(self, layer: int, hidden: Tensor, run: Run) -> Tensor:
        states = self.cache.states.of_rows(layer, 0, len(hidden), self.frozen)
        out = run(hidden, states)
        self.cache.states.keep_rows(layer, 0, states, self.frozen)
        return out
