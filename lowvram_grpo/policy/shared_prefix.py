"""A group's prompt goes through the decoder once for all its completions.

The completions of a micro-batch become ONE row without padding, [prompt 1, completion 1.1, 1.2, ..., prompt 2, ...], in
which each completion's positions continue those of its prompt. Prompt tokens attend causally among themselves, a
completion's tokens to their prompt and causally to themselves. All other modules of a decoder work on single tokens.

    tokens:    sum_g (P_g + sum_i T_gi)         instead of B (P + T) padded ones
    attention: O(P^2 + G T (P + T)) a group     instead of O(G (P + T)^2)

The last token of each completion is left out: nothing attends to it, and no log-prob needs what follows it.

The layout reaches each layer's attention by a keyword argument: see `attention.py`.

Memory of a layer while it runs: K and V of a group expanded to G (P + T) tokens, and a (T, P + T) mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.attention import (
    NAME,
    Fit,
    How,
    Layout,
    Unsupported,
    attend_causally,
    attention_set,
    check_calls,
    laid_out,
    seen,
)  # fmt: skip
from lowvram_grpo.policy.wrapper import unwrap

# Packing is worth a change of path where it leaves out at least a tenth of the tokens.
_WORTH = 0.9


def ragged_index(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """(sum of lengths,) int64: start, start + 1, ... for each of the runs, one after another."""
    runs = [torch.arange(start, start + n) for start, n in zip(starts, lengths)]
    return torch.cat(runs or [torch.empty(0, dtype=torch.long)]).to(device)


class _Group(NamedTuple):
    """Where a group lies in the packed row: `begin` to `end`, its prompt first.

    Attributes:
        own: (G * longest,) int64, where each token of the padded (G, longest) completions lies behind the prompt.
    """

    begin: int
    end: int
    prompt: int
    count: int
    longest: int
    own: Tensor


class PrefixLayout(Layout):
    """Which token of the packed row belongs to what. Made from lengths on the host: nothing here waits for a GPU.

    Args:
        prompt_lengths, completion_lengths: one a row of the batch, b in all; a group's prompts are equal.
        group_sizes: runs of adjacent rows that share a prompt.
        width, prompt_width: of the padded rows (b, width) that `pack` takes, and of their prompts, padded on the left.

    Attributes:
        positions: (1, L) int64 position ids.
        scored: (N,) int64, where in the packed row the state before each completion token is, row after row.
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
    ):
        super().__init__()
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._groups: list[_Group] = []
        taken, positions, scored, unpack = [], [], [], []  # (start, length) runs
        length = padded = row = 0
        for count in group_sizes:
            prompt, begin = prompt_lengths[row], length
            kept = [max(n - 1, 0) for n in completion_lengths[row : row + count]]
            longest = max(kept)
            taken.append((row * width + prompt_width - prompt, prompt))
            positions.append((0, prompt))
            unpack.append((padded, prompt))
            starts = list(accumulate(kept, initial=prompt))
            for i, n in enumerate(kept):
                taken.append(((row + i) * width + prompt_width, n))
                positions.append((prompt, n))
                unpack.append((padded + prompt + i * longest, n))
                if completion_lengths[row + i]:
                    scored += [(begin + prompt - 1, 1), (begin + starts[i], n)]
            # Padding repeats some real token: no real query sees it, and its own output is dropped.
            steps = torch.arange(longest).clamp(max=torch.tensor(kept)[:, None] - 1).clamp(min=0)
            own = (torch.tensor(starts[:-1])[:, None] - prompt + steps).clamp(max=max(starts[-1] - prompt - 1, 0))
            length += starts[-1]
            self._groups.append(_Group(begin, length, prompt, count, longest, own.flatten().to(device)))
            padded += prompt + count * longest
            row += count
        self.length = length
        runs = lambda pairs: ragged_index([a for a, _ in pairs], [n for _, n in pairs], device)
        self._taken, self._unpack, self.scored = runs(taken), runs(unpack), runs(scored)
        self.positions = runs(positions)[None]

    def pack(self, rows: Tensor) -> Tensor:
        """(1, L) of the padded rows (b, width)."""
        return rows.flatten()[self._taken][None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """As `Layout.attend`, with B = 1."""
        if how.softcap is not None:
            raise Unsupported("its attention has soft-capping")
        window, settings = how.window, {"scale": how.scale, "dropout": how.dropout}
        outs = []
        for group in self._groups:
            q, k, v = (x[:, :, group.begin : group.end] for x in (query, key, value))
            prompt, p = [x[:, :, : group.prompt] for x in (q, k, v)], group.prompt
            mask = None if window is None or window >= p else self._mask(0, p, window, q.device)
            outs.append(attend_causally(*prompt, mask, **settings)[0])
            if not group.longest:
                continue
            shape = group.count, group.longest
            own = [x[0, :, p:].index_select(1, group.own).unflatten(1, shape).transpose(0, 1) for x in (q, k, v)]
            keys = [torch.cat([a.expand(group.count, -1, -1, -1), b], 2) for a, b in zip(prompt[1:], own[1:])]
            out = attend_causally(own[0], *keys, self._mask(p, group.longest, window, q.device), **settings)
            outs.append(out.transpose(0, 1).flatten(1, 2))
        return torch.cat(outs, 1).index_select(1, self._unpack).transpose(0, 1)[None]

    def _mask(self, before: int, t: int, window: int | None, device: torch.device) -> Tensor:
        """As `seen`, one for all completions: in the padding, too, each token sees what is before it, but no token that
        counts sees any padding."""
        key = before, t, window
        if key not in self._masks:
            self._masks[key] = seen(before, t, window, device)
        return self._masks[key]


def packed_states(decoder: nn.Module, input_ids: Tensor, layout: PrefixLayout) -> Tensor:
    """(L, H) last hidden states of the packed row, from padded rows (b, width). See `why_not`."""
    return laid_out(decoder, layout, layout.positions, input_ids=layout.pack(input_ids))[0]


def why_not(model: nn.Module) -> str | None:
    """Why the model's groups cannot share their prompts, in words that follow "because"; None where they can.

    The first answer for a model costs a pass over some ten tokens, and sets its attention to `NAME` where it can.
    """
    return _FIT.reason_against(unwrap(model))


def _attempt(decoder: nn.Module, device: torch.device) -> None:
    config = decoder.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise Unsupported("its attention has soft-capping")
    if config._attn_implementation not in ("sdpa", NAME):
        raise Unsupported(f"attn_implementation is {config._attn_implementation}, not sdpa")
    layout = PrefixLayout([2, 2, 1], [3, 1, 2], [2, 1], width=5, prompt_width=2, device=device)
    with attention_set(decoder, keep=True):
        packed_states(decoder, torch.ones(3, 5, dtype=torch.long, device=device), layout)
        check_calls(decoder, layout)


_FIT = Fit(_attempt)


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
        setting: `on`, `off`, or `auto`: where it leaves out a tenth of the tokens, and the model can.

    Raises:
        UserError: `on` for a model that cannot.
    """
    if setting == "off" or not (prompt_lengths and completion_lengths and group_sizes):
        return None
    if setting == "auto":
        padded = len(prompt_lengths) * (max(prompt_lengths) + max(completion_lengths))
        if packed_tokens(prompt_lengths, completion_lengths, group_sizes) > _WORTH * padded:
            return None
    reason = why_not(model)
    if reason and setting == "on":
        raise UserError(f"shared_prefix is on, but {reason}; set it to auto or off.")
    return None if reason else group_sizes
