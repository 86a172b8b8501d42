"""What happens between a step's logits and the sampled tokens, on the device and without the host's help.

The filters have the meaning and the order of transformers' own: unknown ids, repetition penalty, minimum length, then,
unless greedy, temperature, top-k, top-p, min-p. Random numbers are those of `kernels/decode/noise.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowvram_grpo.kernels.decode.noise import draw
from lowvram_grpo.kernels.decode.sample import block_masses, draw_by_masses, has_kernel

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy.

    Attributes:
        eos_ids: every id that ends a completion.
        pad_id: fills up prompts; may equal an end id, masks never look at it.
        known_ids: ids below this have a token; an embedding table is often larger (Qwen2.5: 151,936 rows for 151,665
            tokens) and the rest must not be sampled. None: all.
        extra: further arguments of transformers' GenerationConfig. `min_new_tokens` is known here; anything else
            is left to transformers' `generate` (see `fallback.py`).
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    known_ids: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def min_new_tokens(self) -> int:
        return self.extra.get("min_new_tokens") or 0

    @property
    def foreign(self) -> list[str]:
        """Names in `extra` that only transformers' `generate` knows."""
        return sorted(set(self.extra) - {"min_new_tokens"})

    @property
    def unfiltered(self) -> bool:
        """Whether every known id can be drawn, and from softmax(logits / T) itself."""
        cut = self.top_k or self.top_p < 1.0 or self.min_p or self.min_new_tokens
        return bool(self.temperature) and self.repetition_penalty == 1.0 and not cut


def sampling_of(args: GRPOConfig, eos_ids: tuple[int, ...], tokenizer) -> Sampling:
    """The sampler that a training configuration asks for, on the ids of a tokenizer. End and padding ids among its
    generation_kwargs take the place of the model's."""
    extra = dict(args.generation_kwargs or {})
    if (given := extra.pop("eos_token_id", None)) is not None:
        eos_ids = tuple(sorted({*given})) if isinstance(given, (list, tuple)) else (given,)
    pad_id = extra.pop("pad_token_id", None)
    if pad_id is None:
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    known = max([*tokenizer.get_vocab().values(), *eos_ids], default=None)
    return filters_of(
        args,
        eos_ids=eos_ids,
        pad_id=pad_id,
        known_ids=None if known is None else known + 1,
        extra=extra,
    )


def filters_of(args: GRPOConfig, **ids: Any) -> Sampling:
    """A sampler with the length, temperature and filters of a training configuration; `ids` are the other fields."""
    return Sampling(
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
        **ids,
    )


# Filters: float32 (B, V) in, the same shape out; what is ruled out is -inf


def forbid_unknown(logits: Tensor, known_ids: int) -> Tensor:
    """Rows of the embedding table without a token are never sampled."""
    if logits.shape[1] <= known_ids:
        return logits
    return logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= known_ids, -torch.inf)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of the `seen` (B, V) bool ids divided by `penalty` where positive, multiplied where negative (CTRL,
    arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest, and what equals the least of them."""
    least = logits.topk(min(k, logits.shape[1]), dim=1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest most probable ids that have p of the mass together, at least one (arXiv:1904.09751)."""
    ascending, order = logits.sort(dim=1)
    drop = ascending.softmax(1).cumsum(1) <= 1 - p
    drop[:, -1] = False
    return logits.masked_fill(torch.empty_like(drop).scatter_(1, order, drop), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Ids that are at least p times as probable as the most probable one (arXiv:2407.01082)."""
    probs = logits.softmax(1)
    return logits.masked_fill(probs < p * probs.amax(1, keepdim=True), -torch.inf)


class Sampler:
    """Draws for up to R rows, each at a step of its own in its completion.

    Args:
        rows: R.
        fused: read the logits once, by the kernel, where there is one and no filter.
    """

    def __init__(self, sampling: Sampling, rows: int, vocab: int, device: torch.device, *, fused: bool = False):
        self.sampling, self.fused = sampling, fused
        ends = [i for i in sampling.eos_ids if i < vocab]  # a tokenizer may know ids that the model does not
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device)

    @property
    def penalizes(self) -> bool:
        """Whether it must know which ids each row has seen, its prompt included."""
        return self.seen is not None

    def admit(self, rows: Sequence[int], prompt_rows: Tensor, prompt_ids: Tensor) -> None:
        """These rows begin completions; `prompt_ids` (K,) are those of their prompts, all in one, and `prompt_rows`
        (K,) the row of each."""
        if self.seen is not None:
            for row in rows:
                self.seen[row] = False
            self.seen[prompt_rows, prompt_ids] = True

    def move(self, source: int, target: int) -> None:
        """A row goes on in the place of another."""
        if self.seen is not None:
            self.seen[target] = self.seen[source]

    def __call__(self, logits: Tensor, keys: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) ids of the first B rows, and their float32 log-probs under softmax(logits / T), before any filter.

        Args:
            logits: float32 (B, V), used up.
            keys: int64 (B,), see `noise.stream_key`.
            steps: int64 (B,), tokens that each row has drawn before.
        """
        if self.fused and self.sampling.unfiltered and has_kernel(logits):
            return self._by_blocks(logits, keys, steps)
        return self._by_operators(logits, keys, steps)

    def _by_operators(self, logits: Tensor, keys: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        if self.sampling.temperature not in (0.0, 1.0):
            logits /= self.sampling.temperature
        filtered = self._filtered(logits, steps)
        tokens = draw(filtered, keys, steps) if self.sampling.temperature else filtered.argmax(1)
        if self.seen is not None:
            self.seen[: len(tokens)].scatter_(1, tokens[:, None], True)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)

    def _by_blocks(self, logits: Tensor, keys: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """The same without filters, the logits read once."""
        temperature, known = self.sampling.temperature, self.sampling.known_ids
        return draw_by_masses(logits, *block_masses(logits, temperature, known), keys, steps, temperature, known)

    def _filtered(self, logits: Tensor, steps: Tensor) -> Tensor:
        """The penalty commutes with the temperature, so it may come after it."""
        sampling = self.sampling
        if sampling.known_ids is not None:
            logits = forbid_unknown(logits, sampling.known_ids)
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen[: len(logits)], sampling.repetition_penalty)
        if sampling.min_new_tokens:
            early = (steps < sampling.min_new_tokens)[:, None]
            logits = logits.index_copy(1, self.ends, logits[:, self.ends].masked_fill(early, -torch.inf))
        if not sampling.temperature:
            return logits
        if sampling.top_k:
            logits = keep_top_k(logits, sampling.top_k)
        if sampling.top_p < 1.0:
            logits = keep_top_p(logits, sampling.top_p)
        return keep_min_p(logits, sampling.min_p) if sampling.min_p else logits
