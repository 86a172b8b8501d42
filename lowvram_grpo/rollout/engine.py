"""Completions from the training weights themselves: one prefill a prompt, its KV cache copied to the G completions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowvram_grpo.policy.load import unwrap
from lowvram_grpo.rollout.sampler import LogprobRecorder, Sampling
from lowvram_grpo.scoring import position_ids


@dataclass
class RolloutBatch:
    """B = prompts * G completions, those of one prompt adjacent. Lists are ragged: nothing is padded.

    Attributes:
        prompt_ids: one list a completion (a group shares the list).
        completion_ids: the sampled ids, the end token included where one was drawn. Training uses these very ids.
        sampling_per_token_logps: float32 (T_i,) log-probs at the sampling temperature, before any filter.
        truncated: True where the length limit, not an end token, stopped the completion.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    sampling_per_token_logps: list[Tensor]
    truncated: list[bool]


def pad_left(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


@contextmanager
def sampling_mode(model: nn.Module, sampling: Sampling) -> Iterator[None]:
    """Eval mode, no gradient, and a generation config with no defaults to leak.

    In train mode with activation checkpointing on, transformers drops the KV cache and still feeds only the last token:
    4 % of the tokens come out right.
    """
    causal_lm, was_training = unwrap(model), model.training
    inherited, causal_lm.generation_config = causal_lm.generation_config, sampling.generation_config()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        causal_lm.generation_config = inherited
        model.train(was_training)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on `seed` alone; the global generators are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class GenerateEngine:
    """Samples with transformers' `generate`, at most `rows` completions at once (whole groups; None: all)."""

    def __init__(self, model: nn.Module, sampling: Sampling, rows: int | None = None):
        self.model, self.sampling, self.rows = model, sampling, rows

    def generate(self, prompt_ids: list[list[int]], num_generations: int, *, seed: int) -> RolloutBatch:
        """G completions of each prompt. The same seed, weights and prompts give the same completions."""
        batch = RolloutBatch([], [], [], [])
        at_once = len(prompt_ids) if self.rows is None else max(1, self.rows // num_generations)
        device = next(self.model.parameters()).device
        with sampling_mode(self.model, self.sampling), seeded(seed, device):
            for first in range(0, len(prompt_ids), at_once):
                prompts = prompt_ids[first : first + at_once]
                self._append(batch, prompts, *self._sample(prompts, num_generations, device), num_generations)
        return batch

    def _sample(self, prompts: list[list[int]], num_generations: int, device: torch.device) -> tuple[list, Tensor]:
        """Sampled ids, padded, and their log-probs (B, T)."""
        recorder = LogprobRecorder(self.sampling.temperature)
        ids, mask = pad_left(prompts, self.sampling.pad_id, device)
        cache = self._prefill(ids, mask, num_generations)
        ids, mask = (x.repeat_interleave(num_generations, 0) for x in (ids, mask))
        sequences = unwrap(self.model).generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            logits_processor=self.sampling.processors(recorder),
        )
        completions = sequences[:, ids.shape[1] :]
        return completions.tolist(), recorder.finish(completions[:, -1]).cpu()

    def _prefill(self, ids: Tensor, mask: Tensor, num_generations: int) -> DynamicCache | None:
        """KV of all prompt tokens but the last, computed once a prompt and then repeated G times."""
        if ids.shape[1] < 2:
            return None
        causal_lm = unwrap(self.model)
        cache = DynamicCache(config=causal_lm.config)
        decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        decoder(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=position_ids(mask)[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(num_generations)
        return cache

    def _append(
        self, batch: RolloutBatch, prompts: list[list[int]], rows: list[list[int]], logps: Tensor, group: int
    ) -> None:
        """Cut each row behind its first end token."""
        ends = set(self.sampling.eos_ids)
        for i, row in enumerate(rows):
            stop = next((t for t, token in enumerate(row) if token in ends), None)
            length = len(row) if stop is None else stop + 1
            batch.prompt_ids.append(prompts[i // group])
            batch.completion_ids.append(row[:length])
            batch.sampling_per_token_logps.append(logps[i, :length])
            batch.truncated.append(stop is None)


def end_ids(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """Every id that ends a completion: those of the model's generation_config and the tokenizer's own."""
    found = getattr(unwrap(model).generation_config, "eos_token_id", None)
    ids = list(found) if isinstance(found, (list, tuple)) else [found]
    return tuple(sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None}))
