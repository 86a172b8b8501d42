"""transformers' own `generate`: for `generation_kwargs` that the engine does not know, n-gram bans for one, and for
architectures that cannot decode in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)  # fmt: skip
from transformers.modeling_outputs import CausalLMOutput

from lowvram_grpo.rollout.batch import pad_left
from lowvram_grpo.rollout.sampler import Sampling, forbid_unknown


def generate_in_waves(
    causal_lm: nn.Module,
    sampling: Sampling,
    prompts: list[list[int]],
    group: int,
    rows: int | None,
    seed: int,
    device: torch.device,
) -> list[tuple[list[int], Tensor]]:
    """Ids and log-probs of G completions of each prompt in order, padded behind the end, at most `rows` at a time."""
    found = []
    with seeded(seed, device):
        for pairs in waves(len(prompts), group, rows):
            here = [prompts[p] for p in sorted({p for p, _ in pairs})]
            ids, mask = pad_left(here, sampling.pad_id, device)
            each = len(pairs) // len(here)  # whole groups, or a part of one
            found += zip(*_generate(causal_lm, sampling, ids, mask, each))
    return found


def waves(prompts: int, group: int, rows: int | None) -> list[list[tuple[int, int]]]:
    """(prompt, completion) pairs in order, cut into waves of at most `rows` (None: one wave).

    Groups stay whole where they fit, and are cut into equal parts where not.
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


def _generate(
    causal_lm: nn.Module, sampling: Sampling, ids: Tensor, mask: Tensor, num_generations: int
) -> tuple[list[list[int]], Tensor]:
    """G completions of each left-padded prompt (P, L): ids, padded behind the end, and log-probs (P * G, T) on the
    host. Draws come from the global generators: see `seeded`."""
    recorder = LogprobRecorder(sampling.temperature)
    ids, mask = (x.repeat_interleave(num_generations, 0) for x in (ids, mask))
    hook = causal_lm.register_forward_hook(recorder.hook, with_kwargs=True)
    try:
        with _generation_config_set(causal_lm, generation_config(sampling)):
            sequences = causal_lm.generate(input_ids=ids, attention_mask=mask, logits_processor=_processors(sampling))
    finally:
        hook.remove()
    completions = sequences[:, ids.shape[1] :]
    return completions.tolist(), recorder.finish(completions[:, -1]).cpu()


def rehearse_waves(
    causal_lm: nn.Module,
    rows: int,
    prompt_length: int,
    completion_length: int,
    device: torch.device,
    on_prefilled: Callable[[], None],
) -> None:
    """The memory of a wave of `rows` without its time: the prefill, which repeats the prompts, and the last step."""
    cache = DynamicCache(config=causal_lm.config)
    ids = torch.zeros(rows, prompt_length, dtype=torch.long, device=device)

    def forward(ids: Tensor, first: int) -> Tensor:
        positions = torch.arange(first, first + ids.shape[1], device=device).expand(rows, -1)
        out = causal_lm(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float()

    try:
        forward(ids, 0)
        on_prefilled()
        _skip(cache, completion_length - 1)
        forward(ids[:, :1], prompt_length + completion_length - 1).softmax(1)
    finally:
        cache.layers.clear()


def _skip(cache: DynamicCache, tokens: int) -> None:
    """Go on as if so many tokens had been drawn."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:
            continue
        length = layer.keys.shape[2] + tokens
        if getattr(layer, "is_sliding", False):
            length = min(length, layer.sliding_window - 1)
            layer.cumulative_length += tokens
        blank = lambda x, n=length: x.new_zeros(x.shape[0], x.shape[1], n, x.shape[3])
        layer.keys, layer.values = blank(layer.keys), blank(layer.values)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on `seed` alone; the global generators are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _generation_config_set(causal_lm: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """The model's own generation_config put aside: whatever ours leaves None would be inherited from it."""
    inherited, causal_lm.generation_config = causal_lm.generation_config, config
    try:
        yield
    finally:
        causal_lm.generation_config = inherited


def generation_config(sampling: Sampling) -> GenerationConfig:
    """Every sampling argument spelled out: whatever is left None would be inherited from the model's own
    generation_config (top_p 0.8, top_k 20, repetition_penalty 1.1 in Qwen2.5)."""
    filters = {}
    if sampling.temperature > 0:
        filters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or None,  # 0 would cost a softmax a step
            "typical_p": 1.0,
            "epsilon_cutoff": 0.0,
            "eta_cutoff": 0.0,
        }
    fixed = {
        "max_new_tokens": sampling.max_new_tokens,
        "min_length": 0,
        "do_sample": sampling.temperature > 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "use_cache": True,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": list(sampling.eos_ids),
        "pad_token_id": sampling.pad_id,
    }
    return GenerationConfig(**{**fixed, **filters, **sampling.extra})


def _processors(sampling: Sampling) -> LogitsProcessorList:
    chain: list[LogitsProcessor] = []
    if sampling.known_ids is not None:
        chain.append(_ForbidUnknown(sampling.known_ids))
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    return LogitsProcessorList(chain)


class _ForbidUnknown(LogitsProcessor):
    def __init__(self, known_ids: int):
        self.known_ids = known_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return forbid_unknown(scores, self.known_ids)


class LogprobRecorder:
    """Keeps the log-prob of each sampled token under softmax(logits / T), one step's logits at a time.

    `generate` can return the logits of every step, but that is T x B x V floats: 1.5 GB for 300 tokens of 8 rows of
    Qwen2.5. A token is known when it is fed to the next step, so one step's logits are enough. They are the model's
    own, from its forward pass: among the logits processors, transformers' come before any that it is given.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature or 1.0
        self._previous: Tensor | None = None
        self._logps: list[Tensor] = []

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, out: CausalLMOutput) -> None:
        """Forward hook of the model."""
        self._record(kwargs["input_ids"][:, -1])
        self._previous = out.logits[:, -1]

    def _record(self, tokens: Tensor) -> None:
        if self._previous is not None:
            logits = self._previous.float() / self.temperature
            self._logps.append(logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1))
            self._previous = None

    def finish(self, last_tokens: Tensor) -> Tensor:
        """(B, T) float32 log-probs, once the last tokens (B,) are known."""
        self._record(last_tokens)
        return torch.stack(self._logps, 1)
