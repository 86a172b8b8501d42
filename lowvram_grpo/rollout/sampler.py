"""What happens between logits and the sampled token, as transformers logits processors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

if TYPE_CHECKING:
    from lowvram_grpo.config import GRPOConfig


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy.

    Attributes:
        eos_ids: every id that ends a completion.
        pad_id: fills up finished rows; may equal an end id, masks never look at it.
        known_ids: ids below this have a token; an embedding table is often larger (Qwen2.5: 151,936 rows for 151,665
            tokens) and the rest must not be sampled. None: all.
        extra: further arguments of GenerationConfig.
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

    def generation_config(self) -> GenerationConfig:
        """Every sampling argument spelled out: whatever is left None would be inherited from the model's own
        generation_config (top_p 0.8, top_k 20, repetition_penalty 1.1 in Qwen2.5)."""
        filters = {}
        if self.temperature > 0:
            filters = {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "min_p": self.min_p,
                "typical_p": 1.0,
                "epsilon_cutoff": 0.0,
                "eta_cutoff": 0.0,
            }
        fixed = {
            "max_new_tokens": self.max_new_tokens,
            "min_length": 0,
            "do_sample": self.temperature > 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "use_cache": True,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "eos_token_id": list(self.eos_ids),
            "pad_token_id": self.pad_id,
        }
        return GenerationConfig(**{**fixed, **filters, **self.extra})

    def processors(self, recorder: LogprobRecorder) -> LogitsProcessorList:
        """The recorder first, so that it sees the model's own logits; penalties after it."""
        chain: list[LogitsProcessor] = [recorder]
        if self.known_ids is not None:
            chain.append(ForbidUnknown(self.known_ids))
        if self.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        return LogitsProcessorList(chain)


def sampling_of(args: GRPOConfig, eos_ids: tuple[int, ...], tokenizer) -> Sampling:
    """The sampler that a training configuration asks for."""
    known = max([*tokenizer.get_vocab().values(), *eos_ids], default=None)
    return Sampling(
        max_new_tokens=args.max_completion_length,
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
        known_ids=None if known is None else known + 1,
        extra=args.generation_kwargs or {},
    )


class ForbidUnknown(LogitsProcessor):
    """Rows of the embedding table without a token are never sampled."""

    def __init__(self, known_ids: int):
        self.known_ids = known_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.shape[1] <= self.known_ids:
            return scores
        forbidden = torch.arange(scores.shape[1], device=scores.device) >= self.known_ids
        return scores.masked_fill(forbidden, -torch.inf)


class LogprobRecorder(LogitsProcessor):
    """Keeps the log-prob of each sampled token under softmax(logits / T), one step's logits at a time.

    `generate` can return the logits of every step, but that is T x B x V floats: 1.5 GB for 300 tokens of 8 rows of
    Qwen2.5. A token is known when the next step's logits arrive, so one step's logits are enough.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature or 1.0
        self._previous: Tensor | None = None
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._settle(input_ids[:, -1])
        self._previous = scores
        return scores

    def _settle(self, tokens: Tensor) -> None:
        if self._previous is not None:
            logits = self._previous.float() / self.temperature
            self._logps.append(logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1))
            self._previous = None

    def finish(self, last_tokens: Tensor) -> Tensor:
        """(B, T) float32 log-probs, once the last tokens (B,) are known."""
        self._settle(last_tokens)
        return torch.stack(self._logps, 1)
