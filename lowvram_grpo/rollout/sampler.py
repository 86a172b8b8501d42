"""What happens between a step's logits and the sampled tokens, on the device and without the host's help.

The filters have the meaning and the order of transformers' own: unknown ids, repetition penalty, minimum length, then,
unless greedy, temperature, top-k, top-p, min-p. Noise is a function of (seed, prompt, completion, token), so what a
completion draws depends neither on who is sampled beside it nor on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from lowvram_grpo.config import GRPOConfig

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # increment and multipliers of splitmix64 (Steele, Lea, Flood 2014)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BLOCK = 128


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


def sampling_of(args: GRPOConfig, eos_ids: tuple[int, ...], tokenizer) -> Sampling:
    """The sampler that a training configuration asks for, on the ids of a tokenizer."""
    known = max([*tokenizer.get_vocab().values(), *eos_ids], default=None)
    return filters_of(
        args,
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        known_ids=None if known is None else known + 1,
        extra=args.generation_kwargs or {},
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


# Noise


def _signed(x: int) -> int:
    """The int64 with the bits of x modulo 2^64."""
    x &= _MASK64
    return x - 2**64 if x >= 2**63 else x


def _mix_int(x: int) -> int:
    """splitmix64's finalizer on a Python integer."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _MASK64
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _MASK64
    return x ^ (x >> 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64; products wrap."""
    x = (x ^ _shift(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def stream_key(seed: int, prompt: int, completion: int) -> int:
    """int64 key of the random stream of one completion."""
    return _signed(_mix_int(_mix_int(_mix_int(seed + _GOLDEN) + prompt) + completion))


def gumbel(keys: Tensor, step: int, stream: int, n: int) -> Tensor:
    """float64 (B, n) Gumbel noise from int64 (B,) keys, the token's position and the number of the stream."""
    start = _mix(keys + _signed((2 * step + stream + 1) * _GOLDEN))
    index = torch.arange(1, n + 1, device=keys.device)
    bits = _shift(_mix(start[:, None] + index * _signed(_GOLDEN)), 11)
    return -(-((bits.double() + 0.5) * 2.0**-53).log()).log()


def draw(logits: Tensor, keys: Tensor, step: int) -> Tensor:
    """(B,) ids drawn from softmax(logits), float32 (B, V), by Gumbel-max in two stages.

    A block of 128 ids is drawn by its mass, then an id in it: V / 128 + 128 random numbers a row where plain Gumbel-max
    would take V, and no running sum over V whose rounding would favour the early ids.
    """
    logits = F.pad(logits, (0, -logits.shape[1] % _BLOCK), value=-torch.inf).unflatten(1, (-1, _BLOCK))
    mass = logits.logsumexp(2)
    block = (mass + gumbel(keys, step, 0, mass.shape[1])).argmax(1)
    inside = logits.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
    return block * _BLOCK + (inside + gumbel(keys, step, 1, _BLOCK)).argmax(1)


class Sampler:
    """Draws for the B rows of a wave, step by step.

    Args:
        keys: (B,) int64, see `stream_key`.
        prompt_ids: (B, P), without padding or with a row's own ids as its padding; only for a repetition penalty.
    """

    def __init__(self, sampling: Sampling, keys: Tensor, prompt_ids: Tensor, vocab: int):
        self.sampling, self.keys = sampling, keys
        self.ends = torch.tensor(sampling.eos_ids, dtype=torch.long, device=keys.device)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(keys), vocab, dtype=torch.bool, device=keys.device)
            self.seen.scatter_(1, prompt_ids, True)

    def __call__(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(B,) ids of step `step` (from 0), and their float32 log-probs under softmax(logits / T), before any filter.

        `logits`, float32 (B, V), are used up.
        """
        if self.sampling.temperature not in (0.0, 1.0):
            logits /= self.sampling.temperature
        filtered = self._filtered(logits, step)
        tokens = draw(filtered, self.keys, step) if self.sampling.temperature else filtered.argmax(1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)

    def _filtered(self, logits: Tensor, step: int) -> Tensor:
        """The penalty commutes with the temperature, so it may come after it."""
        at = self.sampling
        if at.known_ids is not None:
            logits = forbid_unknown(logits, at.known_ids)
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen, at.repetition_penalty)
        if step < at.min_new_tokens:
            logits = logits.index_fill(1, self.ends, -torch.inf)
        if not at.temperature:
            return logits
        if at.top_k:
            logits = keep_top_k(logits, at.top_k)
        if at.top_p < 1.0:
            logits = keep_top_p(logits, at.top_p)
        return keep_min_p(logits, at.min_p) if at.min_p else logits
