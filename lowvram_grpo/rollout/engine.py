"""Completions from the training weights themselves, in waves that fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.decode import Wave, decode
from lowvram_grpo.rollout.fallback import generate_with_transformers, seeded
from lowvram_grpo.rollout.sampler import Sampling, stream_key


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
def sampling_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient.

    In train mode with activation checkpointing on, transformers drops the KV cache and still feeds only the last token:
    4 % of the tokens come out right.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def waves(prompts: int, group: int, rows: int | None) -> list[list[tuple[int, int]]]:
    """(prompt, completion) pairs in order, cut into waves of at most `rows` (None: one wave).

    A prompt is prefilled once a wave, so groups stay whole where they fit, and are cut into equal parts where not.
    """
    pairs = [(p, g) for p in range(prompts) for g in range(group)]
    if rows is None or rows >= len(pairs):
        return [pairs] if pairs else []
    if rows >= group:
        step = rows // group * group
        return [pairs[first : first + step] for first in range(0, len(pairs), step)]
    parts = -(-group // rows)
    edges = [group * i // parts for i in range(parts + 1)]
    return [pairs[p * group + a : p * group + b] for p in range(prompts) for a, b in pairwise(edges)]


class GenerateEngine:
    """Samples from the training weights through the head that scores them.

    Args:
        rows: completions sampled at once, all if left out; a group may be split over several waves.
        workspace_mib: memory for tiles of the head.
        on_cache: called with the KV cache whenever it has grown, for a ledger to tag its storages.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling,
        rows: int | None = None,
        *,
        workspace_mib: int = 64,
        on_cache: Callable[[DynamicCache], None] | None = None,
    ):
        self.model, self.sampling, self.rows = model, sampling, rows
        self.workspace_mib, self.on_cache = workspace_mib, on_cache
        if sampling.foreign:
            warnings.warn(
                f"generation_kwargs {', '.join(sampling.foreign)}: completions are sampled by transformers' generate, "
                "which is slower, and what is drawn depends on rollout_batch_size.",
                stacklevel=2,
            )

    @property
    def device(self) -> torch.device:
        """Where the model computes; its input embedding may be in host memory."""
        return next(self.model.parameters()).device

    def generate(
        self, prompt_ids: list[list[int]], num_generations: int, *, seed: int, sampling: Sampling | None = None
    ) -> RolloutBatch:
        """G completions of each prompt, drawn as `sampling` says (None: as the engine was made). The same seed, weights
        and prompts give the same completions, to rounding whatever `rows` is. The KV cache is gone when this
        returns."""
        if sampling is not None:
            engine = RolloutEngine(self.model, sampling, self.rows, workspace_mib=self.workspace_mib)
            return engine.generate(prompt_ids, num_generations, seed=seed)
        batch = RolloutBatch([], [], [], [])
        with sampling_mode(self.model):
            if self.sampling.foreign:
                self._generate_by_transformers(batch, prompt_ids, num_generations, seed)
            else:
                for pairs in waves(len(prompt_ids), num_generations, self.rows):
                    self._append(batch, [prompt_ids[p] for p, _ in pairs], *self._sample(prompt_ids, pairs, seed))
        return batch

    def stream(self, prompt_ids: list[int], *, seed: int, sampling: Sampling | None = None) -> Iterator[int]:
        """The ids of one completion as they are drawn, the end token included."""
        sampling, device = sampling or self.sampling, self.device
        ids, owner = torch.tensor([prompt_ids], device=device), torch.zeros(1, dtype=torch.long, device=device)
        keys = torch.tensor([stream_key(seed, 0, 0)], device=device)
        was_training, wave = self.model.training, None
        self.model.eval()
        try:
            for _ in range(sampling.max_new_tokens):
                with torch.no_grad():  # not around the yield: whoever reads the stream would run under it
                    if wave is None:
                        wave = Wave(
                            unwrap(self.model), sampling, ids, None, owner, keys, workspace_mib=self.workspace_mib
                        )
                    token = int(wave.step()[0])
                yield token
                if token in sampling.eos_ids:
                    break
        finally:
            if wave is not None:
                wave.close()
            self.model.train(was_training)

    def _sample(
        self, prompt_ids: list[list[int]], pairs: list[tuple[int, int]], seed: int
    ) -> tuple[list[list[int]], Tensor]:
        """Ids and log-probs (B, T) of one wave."""
        first, last, device = pairs[0][0], pairs[-1][0], self.device
        prompts = prompt_ids[first : last + 1]
        ids, mask = pad_left(prompts, self.sampling.pad_id, device)
        equal = len({len(p) for p in prompts}) == 1
        owner = torch.tensor([p - first for p, _ in pairs], device=device)
        keys = torch.tensor([stream_key(seed, p, g) for p, g in pairs], device=device)
        wave = self._wave(ids, None if equal else mask, owner, keys)
        try:
            return decode(wave, self.sampling)
        finally:
            wave.close()

    def _wave(self, ids: Tensor, mask: Tensor | None, owner: Tensor, keys: Tensor) -> Wave:
        return Wave(
            unwrap(self.model), self.sampling, ids, mask, owner, keys,
            workspace_mib=self.workspace_mib, on_cache=self.on_cache,
        )  # fmt: skip

    def rehearse(
        self,
        prompt_length: int,
        completion_length: int,
        rows: int,
        num_generations: int | None = None,
        *,
        ragged: bool = False,
    ) -> None:
        """The memory of a wave of `rows` completions without its time: the prefill, and the last decode step with a
        cache that holds prompt_length + completion_length - 1 tokens by its end. Runs on meta tensors too.

        Args:
            prompt_length: tokens of every prompt; at least 2 are taken.
            num_generations: completions of a prompt, hence rows / G prompts, rounded up; one prompt if left out.
            ragged: where there are several prompts, one is a token shorter, so that attention takes a mask.
        """
        group, device = num_generations or rows, self.device
        ids = torch.zeros(-(-rows // group), max(2, prompt_length), dtype=torch.long, device=device)
        owner = torch.arange(rows, device=device) // group
        mask = None
        if ragged and len(ids) > 1:
            mask = torch.ones_like(ids)
            mask[0, 0] = 0
        with sampling_mode(self.model):
            wave = self._wave(ids, mask, owner, torch.zeros_like(owner))
            try:
                wave.skip(completion_length - 1)
                wave.step()
            finally:
                wave.close()

    def _generate_by_transformers(
        self, batch: RolloutBatch, prompt_ids: list[list[int]], group: int, seed: int
    ) -> None:
        with seeded(seed, self.device):
            for pairs in waves(len(prompt_ids), group, self.rows):
                prompts = [prompt_ids[p] for p in sorted({p for p, _ in pairs})]
                ids, mask = pad_left(prompts, self.sampling.pad_id, self.device)
                each = len(pairs) // len(prompts)  # whole groups, or a part of one
                found = generate_with_transformers(unwrap(self.model), self.sampling, ids, mask, each)
                self._append(batch, [p for p in prompts for _ in range(each)], *found)

    def _append(self, batch: RolloutBatch, prompts: list[list[int]], rows: list[list[int]], logps: Tensor) -> None:
        """Cut each row behind its first end token."""
        ends = set(self.sampling.eos_ids)
        for i, row in enumerate(rows):
            stop = next((t for t, token in enumerate(row) if token in ends), None)
            length = len(row) if stop is None else stop + 1
            batch.prompt_ids.append(prompts[i])
            batch.completion_ids.append(row[:length])
            batch.sampling_per_token_logps.append(logps[i, :length])
            batch.truncated.append(stop is None)


RolloutEngine = GenerateEngine


def end_ids(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """Every id that ends a completion: those of the model's generation_config and the tokenizer's own."""
    found = getattr(unwrap(model).generation_config, "eos_token_id", None)
    ids = list(found) if isinstance(found, (list, tuple)) else [found]
    return tuple(sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None}))
