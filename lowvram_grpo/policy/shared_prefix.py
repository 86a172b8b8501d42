"""A group's prompt goes through the decoder once for all its completions.

The completions of a micro-batch become ONE row without padding, [prompt 1, completion 1.1, 1.2, ..., prompt 2, ...], in
which each completion's positions continue those of its prompt. Prompt tokens attend causally among themselves, a
completion's tokens to their prompt and causally to themselves. Layers with a state run over each prompt, and from the
state at its end over its completions. All other modules of a decoder work on single tokens.

    tokens:    sum_g (P_g + sum_i T_gi)         instead of B (P + T) padded ones
    attention: O(P^2 + G T (P + T)) a group     instead of O(G (P + T)^2)

The last token of each completion is left out: nothing attends to it, and no log-prob needs what follows it.

The layout reaches each layer's attention by a keyword argument: see `attention.py`.

Memory of a layer while it runs: K and V of a group expanded to P + G (P + T) tokens and to the heads of Q, and a
(T, P + T) bias that all layers share. Where these are large, completions attend in two parts: see `split_attention.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.host import upload
from lowvram_grpo.policy.attend import attend_by_blocks, attend_causally, causal_bias
from lowvram_grpo.policy.attention import (
    NAME,
    TOLERANCE,
    AttentionParams,
    Layout,
    SupportCheck,
    Unsupported,
    attention_dtype,
    check_calls,
    forward_with_layout,
    layout_attention,
    ranges,
)  # fmt: skip
from lowvram_grpo.policy.gather_kv import KVCopies, gather_kv
from lowvram_grpo.policy.recurrent import (
    CONTINUES,
    Run,
    States,
    continued,
    recomputed_with_layout,
    recurrent_layers,
)  # fmt: skip
from lowvram_grpo.policy.split_attention import Padding, attend_in_parts, takes, worth_while
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.policy.xformers_attention import Kernel, shared_blocks

# Packing is worth a change of path where it leaves out at least a tenth of the tokens.
_MAX_PACKED_SHARE = 0.9
# And where a padded row has so many tokens, for its mask is the square of that: 150 MiB for 12,288, twice as a bias.
_LONG = 4096


class _Group(NamedTuple):
    """Where a group lies in the packed row, `begin` to `end`, its prompt first; indices are int64.

    Attributes:
        pad: (G * longest,), where each token of the padded (G, longest) completions lies behind the prompt.
        unpad: (end - begin - prompt,), the other way: where each token behind the prompt lies in those.
        keys: (prompt + G (prompt + longest),), which of the group's tokens are the keys of its prompt, then of each
            padded completion.
    """

    begin: int
    end: int
    prompt: int
    count: int
    longest: int
    pad: Tensor
    unpad: Tensor
    keys: Tensor
    copies: KVCopies


class PrefixLayout(Layout):
    """Which token of the packed row belongs to what. Made from lengths on the host, and in one upload: nothing here
    waits for a GPU.

    Args:
        prompt_lengths, completion_lengths: one a row of the batch, b in all; a group's prompts are equal.
        group_sizes: runs of adjacent rows that share a prompt.
        width, prompt_width: of the padded rows (b, width) that `pack` takes, and of their prompts, padded on the left.
        kernel: attends where it can, sdpa elsewhere.

    Attributes:
        positions: (1, L) int64 position ids.
        scored: (N,) int64, where in the packed row the state before each completion token is, row after row.
        targets: (N,) int64, where those tokens are in the completions (b, width - prompt_width), flattened.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        completion_lengths: Sequence[int],
        group_sizes: Sequence[int],
        *,
        width: int,
        prompt_width: int,
        device: torch.device,
        kernel: Kernel | None = None,
    ):
        super().__init__()
        self._biases: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}
        taken, positions, scored, targets = [], [], [], []  # (start, length) ranges
        shapes, indices, groups = [], [], []
        length = row = 0
        for count in group_sizes:
            prompt, begin = prompt_lengths[row], length
            kept = [max(n - 1, 0) for n in completion_lengths[row : row + count]]
            longest, starts = max(kept), list(accumulate(kept, initial=0))
            taken.append((row * width + prompt_width - prompt, prompt))
            positions.append((0, prompt))
            for i, n in enumerate(kept):
                taken.append(((row + i) * width + prompt_width, n))
                positions.append((prompt, n))
                if completion_lengths[row + i]:
                    scored += [(begin + prompt - 1, 1), (begin + prompt + starts[i], n)]
                targets.append(((row + i) * (width - prompt_width), completion_lengths[row + i]))
            length += prompt + starts[-1]
            groups.append((prompt, kept))
            shapes.append((begin, length, prompt, count if longest else 0, longest))
            indices += _group_indices(prompt, kept, starts, longest)
            row += count
        self.length, self._packed = length, None
        if kernel is not None:
            blocks, keys, copies = shared_blocks(groups)
            self._packed = kernel.on(blocks, device)
            indices += [keys, *(x for each in copies for x in (each.shared, each.own))]
        packed = upload([ranges(taken), ranges(positions), ranges(scored), ranges(targets), *indices], device)
        self._taken, positions, self.scored, self.targets = packed[:4]
        self.positions = positions[None]
        last = 4 + _INDICES_PER_GROUP * len(shapes)
        if kernel is not None:
            self._keys, pairs = packed[last], zip(packed[last + 1 :: 2], packed[last + 2 :: 2])
            self._copies = [each._replace(shared=shared, own=own) for each, (shared, own) in zip(copies, pairs)]
        parts = zip(*[iter(packed[4:last])] * _INDICES_PER_GROUP)
        self._groups = [
            _Group(*shape, pad, unpad, keys, KVCopies(shape[2], 1 + shape[3], shared, own))
            for shape, (pad, unpad, keys, shared, own) in zip(shapes, parts)
        ]

    def pack(self, rows: Tensor) -> Tensor:
        """(1, L) of the padded rows (b, width)."""
        return rows.flatten()[self._taken][None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """As `Layout.attend`, with B = 1."""
        dtype = attention_dtype(query.device, query.dtype)
        # Before tokens are gathered: attention would cast the copies.
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if self._packed is not None and self._packed.takes(query, value, params):
            keys, values = (gather_kv(x, self._keys, query.shape[1], self._copies)[None] for x in (key, value))
            return self._packed(query.transpose(1, 2), keys, values, params)
        parts = zip(*(self._by_group(x, 2) for x in (query, key, value)))
        return torch.cat(
            [out for group, part in zip(self._groups, parts) for out in self._attend(group, *part, params)]
        )[None]

    def _by_group(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        # Split and not sliced: in the backward pass the parts are put together in one launch.
        sizes = [group.end - group.begin for group in self._groups]
        return x.split(sizes, dim) if len(sizes) > 1 else [x]

    def recur(self, layer: int, hidden: Tensor, run: Run) -> Tensor:
        """As `Layout.recur`, with B = 1. Completions are padded on the right, where padding reaches no token that
        counts."""
        outs = []
        for group, tokens in zip(self._groups, self._by_group(hidden[0], 0)):
            prompt, behind = tokens.split([group.prompt, len(tokens) - group.prompt])
            states = States()
            outs.append(run(prompt[None], states)[0])
            if group.longest:
                rows = _PadQueries.apply(behind, group.pad, group.unpad).unflatten(0, (group.count, group.longest))
                outs.append(continued(run, rows, states).flatten(0, 1).index_select(0, group.unpad))
        return torch.cat(outs)[None]

    def _attend(
        self, group: _Group, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> list[Tensor]:
        """(tokens, heads, d) of the prompt, and of the completions behind it."""
        p, t = group.prompt, group.longest
        if worth_while(p, group.count, t) and takes(query, value, params, p + t):
            return self._attend_in_parts(group, query, key, value, params)
        # Heads that share keys get copies of them on the way, for the prompt and the completions alike.
        keys, values = (gather_kv(x, group.keys, query.shape[1], [group.copies]) for x in (key, value))
        shape = group.count, p + t
        prompt_kv, completion_kv = zip(*(x.split([p, group.count * (p + t)]) for x in (keys, values)))
        prompt_query, completion_query = query.split([p, group.end - group.begin - p], 2)
        out = self._by_params(prompt_query, *(x.transpose(0, 1)[None] for x in prompt_kv), 0, params)
        outs = [out.squeeze(0).transpose(0, 1)]  # not out[0], whose way back fills zeros
        if t:
            q = _PadQueries.apply(completion_query.squeeze(0).transpose(0, 1), group.pad, group.unpad)
            q = q.unflatten(0, (group.count, t))
            kv = (x.unflatten(0, shape).transpose(1, 2) for x in completion_kv)
            out = self._by_params(q.transpose(1, 2), *kv, p, params)
            outs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, group.unpad))
        return outs

    def _attend_in_parts(
        self, group: _Group, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> list[Tensor]:
        sizes = group.prompt, group.end - group.begin - group.prompt
        (prompt, own), (pk, ok), (pv, ov) = (x.split(sizes, 2) for x in (query, key, value))
        out = self._by_params(prompt, pk, pv, 0, params)
        padding = Padding(group.count, group.longest, group.pad, group.unpad)
        return [out.squeeze(0).transpose(0, 1), attend_in_parts(own, (pk, pv), (ok, ov), padding, params.scale)]

    def _by_params(self, q: Tensor, k: Tensor, v: Tensor, before: int, params: AttentionParams) -> Tensor:
        """(B, heads, t, Dv) of queries (B, heads, t, D) that come behind the first `before` of the keys."""
        scale, dropout, window, softcap, sinks = params
        if softcap is not None:
            return attend_by_blocks(
                q, k, v, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout, before=before, window=window
            )
        plain = not before and (window is None or window >= q.shape[2])
        bias = None if plain else self._bias(before, q.shape[2], window, q)
        return attend_causally(q, k, v, bias, scale=scale, dropout=dropout, sinks=sinks)

    def _bias(self, before: int, t: int, window: int | None, query: Tensor) -> Tensor:
        """One for all completions: in the padding, too, each token sees what is before it, but no token that counts
        sees any padding."""
        key = before, t, window, query.dtype
        if key not in self._biases:
            self._biases[key] = causal_bias(before, t, window, query.dtype, query.device)
        return self._biases[key]


# Tensors of a group in the upload.
_INDICES_PER_GROUP = 5


def _group_indices(prompt: int, kept: list[int], starts: list[int], longest: int) -> list[Tensor]:
    """On the host: `pad`, `unpad` and `keys` of a `_Group`, and the indices of its `KVCopies`."""
    count, first_tokens = len(kept) if longest else 0, torch.tensor(starts[:-1], device="cpu")[:, None]
    # Padding repeats some real token: no real query sees it, and its own output is dropped.
    steps = torch.arange(longest, device="cpu").clamp(max=torch.tensor(kept, device="cpu")[:, None] - 1).clamp(min=0)
    pad = (first_tokens + steps).clamp(max=max(starts[-1] - 1, 0))
    prompt_index = torch.arange(prompt, device="cpu")
    rows = torch.cat([prompt_index.expand(len(kept), -1), prompt + pad], 1) if count else pad
    keys = torch.cat([prompt_index, rows.flatten()])
    first = [prompt + i * (prompt + longest) for i in range(count)]
    shared = ranges([(start, prompt) for start in (0, *first)])
    own = ranges([(start + prompt, n) for start, n in zip(first, kept)])
    unpad = ranges([(i * longest, n) for i, n in enumerate(kept)])
    return [pad.flatten(), unpad, keys, shared, own]


class _PadQueries(torch.autograd.Function):
    """Queries (tokens, heads, d), or hidden states (tokens, H), as padded rows, whose gradient is that of the real
    ones: what comes out of padding is dropped and reaches nothing, so its gradient is 0."""

    @staticmethod
    def forward(ctx, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        ctx.unpad = unpad
        return x.index_select(0, pad)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.unpad), None, None


def packed_states(decoder: nn.Module, input_ids: Tensor, layout: PrefixLayout) -> Tensor:
    """(L, H) last hidden states of the packed row, from padded rows (b, width). See `why_not`."""
    return forward_with_layout(decoder, layout, layout.positions, input_ids=layout.pack(input_ids))[0]


def why_not(model: nn.Module) -> str | None:
    """Why the model's groups cannot share their prompts, in words that follow "because"; None where they can.

    The first answer for a model costs a pass over some ten tokens, and sets its attention to `NAME` where it can.
    """
    return _SUPPORT.reason_against(unwrap(model))


def _check_packing(decoder: nn.Module, device: torch.device) -> None:
    asked = decoder.config.get_text_config()._attn_implementation
    # What sdpa does not know (soft-capping, sinks) is eager without anybody having asked for that.
    if asked not in ("sdpa", NAME) and not (asked == "eager" and not decoder._supports_sdpa):
        raise Unsupported(f"attn_implementation is {asked}, not sdpa")
    stateful = bool(recurrent_layers(decoder))
    if stateful and not CONTINUES:
        raise Unsupported("in this transformers its layers cannot go on from a prompt's state (5.17 can)")
    if stateful and not recomputed_with_layout(decoder):
        raise Unsupported("its layers do not hand on what they are told, and would be recomputed without it")
    prompts, completions, p = [2, 2, 1], [3, 1, 2], 2
    layout = PrefixLayout(prompts, completions, [2, 1], width=5, prompt_width=p, device=device)
    ids = torch.arange(1, 6, device=device).expand(3, 5) % decoder.config.get_text_config().vocab_size
    with layout_attention(decoder, keep=True):
        states = packed_states(decoder, ids, layout)
        check_calls(decoder, layout)
        if stateful and not states.is_meta:
            _check_states(decoder, ids, states[layout.scored], prompts, completions, p)


def _check_states(
    decoder: nn.Module, ids: Tensor, ours: Tensor, prompts: list[int], completions: list[int], p: int
) -> None:
    """Raises Unsupported where the states (N, H) before completion tokens are not those of each sequence alone."""
    plain = []
    for row, n, t in zip(ids, prompts, completions):
        alone = decoder(input_ids=row[None, p - n : p + t], use_cache=False).last_hidden_state[0]
        plain.append(alone[n - 1 : n - 1 + t])
    expected = torch.cat(plain).float()
    apart = (ours.float() - expected).norm() / expected.norm()
    if not apart <= TOLERANCE:
        raise Unsupported(f"its layers with a state give others behind a shared prompt (by {apart:.0%})")


_SUPPORT = SupportCheck(_check_packing)
_TOLD: WeakSet[nn.Module] = WeakSet()  # models that cannot, of which `auto` has said so


def packed_tokens(prompt_lengths: Sequence[int], completion_lengths: Sequence[int], group_sizes: Sequence[int]) -> int:
    """How many tokens go through the decoder where prompts are shared."""
    firsts = accumulate(group_sizes[:-1], initial=0)
    return sum(prompt_lengths[i] for i in firsts) + sum(max(n - 1, 0) for n in completion_lengths)


def shared_groups(
    setting: str,
    model: nn.Module,
    prompt_lengths: Sequence[int] | None,
    completion_lengths: Sequence[int] | None,
    group_sizes: list[int] | None,
) -> list[int] | None:
    """The `group_sizes` that scoring should share prompts by; None for the plain path.

    Args:
        setting: `on`, `off`, or `auto`: where it leaves out a tenth of the tokens or rows are long, and the model can.

    Raises:
        UserError: `on` for a model that cannot.
    """
    if setting == "off" or not (prompt_lengths and completion_lengths and group_sizes):
        return None
    if setting == "auto":
        longest = max(prompt_lengths) + max(completion_lengths)
        padded = len(prompt_lengths) * longest
        packed = packed_tokens(prompt_lengths, completion_lengths, group_sizes)
        if longest < _LONG and packed > _MAX_PACKED_SHARE * padded:
            return None
    reason = why_not(model)
    if reason and setting == "on":
        raise UserError(f"shared_prefix is on, but {reason}; set it to auto or off.")
    if reason and model not in _TOLD and not next(model.parameters()).is_meta:
        _TOLD.add(model)
        warnings.warn(
            f"each prompt goes through the model once for each of its completions, because {reason}.", stacklevel=2
        )
    return None if reason else group_sizes
