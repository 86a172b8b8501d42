"""Completions from vLLM instead of the training weights: what its server and its engine on the training card share.

Either gets the adapter, not merged weights, and only when it has changed. What comes back are the ids that were drawn
and their log-probs; text never passes through here, as decoding and encoding again gives other ids now and then.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lowvram_grpo.errors import UserError
from lowvram_grpo.rollout.adapter_versions import AdapterVersions, Version
from lowvram_grpo.rollout.batch import RolloutBatch

if TYPE_CHECKING:
    from lowvram_grpo.rollout.sampler import Sampling

# generation_kwargs that vLLM takes under the same name.
_PASSED = ("presence_penalty", "frequency_penalty", "bad_words", "logit_bias", "min_new_tokens")


class Completion(NamedTuple):
    """ids and logps of one completion; `stopped` where something else than the length limit ended it."""

    ids: list[int]
    logps: list[float]
    stopped: bool


class VLLMEngine:
    """What server and colocated engine share. Stands where `RolloutEngine` does.

    Log-probs are those of vLLM's "processed" mode: at the sampling temperature, and, where top_p, top_k, min_p or a
    penalty are set, after those. That is what the completions were really drawn with, and so the right denominator of
    the importance weight.

    Attributes:
        sampling: as in `RolloutEngine`.
        rows, workspace_mib, converses: settable as there, without effect: vLLM sees to its own memory.
    """

    def __init__(self, sampling: Sampling, versions: AdapterVersions):
        foreign = sorted(set(sampling.extra) - set(_PASSED))
        if foreign:
            raise UserError(
                f"generation_kwargs {', '.join(foreign)}: vLLM gets {', '.join(_PASSED)} from there and nothing else; "
                "leave the others out, or set use_vllm to false."
            )
        self.sampling, self.versions = sampling, versions
        self.rows: int | None = None
        self.workspace_mib, self.converses = 0, False

    def generate(
        self, prompt_ids: list[list[int]], num_generations: int, *, seed: int, sampling: Sampling | None = None
    ) -> RolloutBatch:
        """G completions of each prompt; see `RolloutEngine.generate`. vLLM repeats them for the same seed as far as
        its own kernels repeat.

        Raises:
            UserError: vLLM does not do it; the sentence says why.
        """
        usual, self.sampling = self.sampling, sampling or self.sampling
        try:
            return self._generated(prompt_ids, num_generations, seed)
        finally:
            self.sampling = usual

    def _generated(self, prompt_ids: list[list[int]], num_generations: int, seed: int) -> RolloutBatch:
        self._check_length(max(map(len, prompt_ids)))
        seeds = [prompt_seed(seed, i) for i in range(len(prompt_ids))]
        try:
            self._publish()
            found = self._complete(prompt_ids, num_generations, seeds)
        except UserError:
            # What a person mends often takes a new server, which has no adapter yet.
            self.versions.forget()
            raise
        batch = RolloutBatch([], [], [], [])
        for prompt, completions in zip(prompt_ids, found):
            for completion in completions:
                self._append(batch, prompt, completion)
        return batch

    def rehearse(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: sampling takes none of this process's memory."""

    def _append(self, batch: RolloutBatch, prompt: list[int], completion: Completion) -> None:
        ids, logps = completion.ids, completion.logps
        if not ids or len(ids) != len(logps) or not all(map(math.isfinite, logps)):
            raise UserError(
                f"vLLM returned {len(ids)} tokens with {len(logps)} log-probs, or some that are no numbers; see what "
                "it logged, or set use_vllm to false."
            )
        if max(logps) > 1e-3:
            raise UserError(
                "vLLM returns logits in place of log-probs; start it with --logprobs-mode processed_logprobs."
            )
        batch.prompt_ids.append(prompt)
        batch.completion_ids.append(ids)
        batch.sampling_per_token_logps.append(torch.tensor(logps, dtype=torch.float32))
        batch.truncated.append(not completion.stopped and ids[-1] not in self.sampling.eos_ids)

    def _sampling_params(self) -> dict[str, Any]:
        """Every sampling argument spelled out: what is left out would come from the model's generation_config."""
        sampling = self.sampling
        extra = {name: value for name, value in sampling.extra.items() if name != "min_new_tokens"}
        return {
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(sampling.eos_ids),
            "ignore_eos": False,
            "skip_special_tokens": False,
            "logprobs": 0,  # that of the sampled token alone
            **extra,
        }

    def _publish(self) -> None:
        """Hand the adapter over, if vLLM does not have it as it is."""
        before = self.versions.current
        version = self.versions.renew()
        if version is None:
            return
        self._load_adapter(version, before)
        if before is not None:
            self.versions.remove(before)

    def _max_model_len(self) -> int | None:
        """Tokens that prompt and completion may have together; None if nobody knows."""
        raise NotImplementedError

    def _load_adapter(self, version: Version, before: Version | None) -> None:
        raise NotImplementedError

    def _complete(self, prompts: list[list[int]], group: int, seeds: list[int]) -> Sequence[list[Completion]]:
        raise NotImplementedError

    def _check_length(self, longest: int) -> None:
        limit = self._max_model_len()
        if limit is not None and longest + self.sampling.max_new_tokens > limit:
            raise UserError(
                f"A prompt of {longest} tokens and max_completion_length {self.sampling.max_new_tokens} exceed the "
                f"{limit} tokens that vLLM was started for; start it with a larger --max-model-len "
                "(vllm_max_model_length where it is colocated), or lower max_prompt_length or max_completion_length."
            )


def prompt_seed(seed: int, prompt: int) -> int:
    """Seed of the `prompt`-th prompt, 62 bits. vLLM counts up from it for the completions of a group, so those of
    neighbours must lie far apart."""
    digest = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
