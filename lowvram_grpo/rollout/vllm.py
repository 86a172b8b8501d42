"""Completions from vLLM instead of the training weights: what its two kinds share, and the one that is a server.

Either gets the adapter, not merged weights, and only when it has changed. What comes back are the ids that were drawn
and their log-probs; text never passes through here, as decoding and encoding again gives other ids now and then.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapter_versions import AdapterVersions, Version
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.rollout.vllm_client import VLLMClient, server_command

if TYPE_CHECKING:
    from torch import nn

    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.rollout.sampler import Sampling

# generation_kwargs that vLLM takes under the same name.
_PASSED = ("presence_penalty", "frequency_penalty", "bad_words", "logit_bias", "min_new_tokens")
_REQUESTS_AT_ONCE = 32
# Far from 1, so that log-probs that know of the temperature differ plainly from those that do not.
_HOT = 50.0
_RAW_SENTENCE = (
    "{} reports log-probs before the temperature, and training compares them with its own at temperature {:g}; start "
    "the server with --logprobs-mode processed_logprobs, or set temperature to 1."
)


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
        rows, workspace_mib: settable as there, without effect: vLLM sees to its own memory.
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
        self.workspace_mib = 0

    def generate(self, prompt_ids: list[list[int]], num_generations: int, *, seed: int) -> RolloutBatch:
        """G completions of each prompt; see `RolloutEngine.generate`. vLLM repeats them for the same seed as far as
        its own kernels repeat.

        Raises:
            UserError: vLLM does not do it; the sentence says why.
        """
        self._fit(max(map(len, prompt_ids)))
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

    def _arguments(self) -> dict[str, Any]:
        """Every sampling argument spelled out: what is left out would come from the model's generation_config."""
        at = self.sampling
        extra = {name: value for name, value in at.extra.items() if name != "min_new_tokens"}
        return {
            "max_tokens": at.max_new_tokens,
            "min_tokens": at.min_new_tokens,
            "temperature": at.temperature,
            "top_p": at.top_p,
            "top_k": at.top_k,
            "min_p": at.min_p,
            "repetition_penalty": at.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(at.eos_ids),
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
        self._load(version, before)
        if before is not None:
            self.versions.remove(before)

    def _limit(self) -> int | None:
        """Tokens that prompt and completion may have together; None if nobody knows."""
        raise NotImplementedError

    def _load(self, version: Version, before: Version | None) -> None:
        raise NotImplementedError

    def _complete(self, prompts: list[list[int]], group: int, seeds: list[int]) -> Sequence[list[Completion]]:
        raise NotImplementedError

    def _fit(self, longest: int) -> None:
        limit = self._limit()
        if limit is not None and longest + self.sampling.max_new_tokens > limit:
            raise UserError(
                f"A prompt of {longest} tokens and max_completion_length {self.sampling.max_new_tokens} exceed the "
                f"{limit} tokens that vLLM was started for; start it with a larger --max-model-len "
                "(vllm_max_model_length where it is colocated), or lower max_prompt_length or max_completion_length."
            )


class VLLMServer(VLLMEngine):
    """A server that a person has started.

    Args:
        served: the base model's entry in /v1/models.
        server_folder: the folder of `versions` as the server sees it, where that differs.
    """

    def __init__(
        self,
        sampling: Sampling,
        versions: AdapterVersions,
        client: VLLMClient,
        *,
        served: dict[str, Any],
        server_folder: str | None = None,
    ):
        super().__init__(sampling, versions)
        self.client, self.served, self.server_folder = client, served, server_folder
        self._mode_known = sampling.temperature in (0.0, 1.0)

    def _limit(self) -> int | None:
        return self.served.get("max_model_len")

    def _load(self, version: Version, before: Version | None) -> None:
        if before is not None:
            # First: a server has room for one adapter, and says no to letting go of what it has evicted.
            self.client.unload_adapter(before.name)
        self.client.load_adapter(version.name, self._seen_by_server(version), self.versions.rank)

    def _seen_by_server(self, version: Version) -> str:
        if self.server_folder is None:
            return str(version.folder)
        inside = version.folder.relative_to(self.versions.folder).as_posix()
        return f"{self.server_folder.rstrip('/')}/{inside}"

    def _complete(self, prompts: list[list[int]], group: int, seeds: list[int]) -> Sequence[list[Completion]]:
        self._check_mode(prompts[0])
        one = lambda prompt, seed: self._read(self.client.complete(self._body(prompt, n=group, seed=seed)))
        with ThreadPoolExecutor(min(_REQUESTS_AT_ONCE, len(prompts))) as pool:
            return list(pool.map(one, prompts, seeds))

    def _body(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        fixed = {"model": self.versions.current.name, "prompt": prompt, "return_token_ids": True, "stream": False}
        return {**fixed, **self._arguments(), **more}

    def _read(self, choices: list[dict[str, Any]]) -> list[Completion]:
        unfinished = {str(choice.get("finish_reason")) for choice in choices} - {"stop", "length"}
        if unfinished:
            raise UserError(
                f"The vLLM server broke a completion off ({', '.join(sorted(unfinished))}); see what it logged, and go "
                "on with --resume."
            )
        return [
            Completion(
                list(choice["token_ids"]),
                [math.nan if p is None else float(p) for p in choice["logprobs"]["token_logprobs"]],
                choice["finish_reason"] == "stop",
            )
            for choice in choices
        ]

    def _check_mode(self, prompt: list[int]) -> None:
        """Whether log-probs know of the temperature: a server does not tell, but the most likely token's log-prob at
        another temperature does."""
        if self._mode_known:
            return
        cold, hot = (self._best_logp(prompt, temperature) for temperature in (1.0, _HOT))
        if abs(cold - hot) < 0.05:  # two answers of one server differ by rounding
            where = f"The vLLM server at {self.client.url}"
            raise UserError(_RAW_SENTENCE.format(where, self.sampling.temperature))
        self._mode_known = True

    def _best_logp(self, prompt: list[int], temperature: float) -> float:
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logit_bias": None}
        once = {"n": 1, "seed": 0, "max_tokens": 1, "min_tokens": 0, "logprobs": 1, "temperature": temperature}
        [choice] = self.client.complete(self._body(prompt, **plain, **once))
        return max((choice["logprobs"]["top_logprobs"][0] or {"": 0.0}).values())


def prompt_seed(seed: int, prompt: int) -> int:
    """Seed of the `prompt`-th prompt, 62 bits. vLLM counts up from it for the completions of a group, so those of
    neighbours must lie far apart."""
    digest = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


# From a configuration


def check_vllm(args: GRPOConfig) -> None:
    """Whether vLLM can be had here at all, before anything is loaded.

    Raises:
        UserError: colocated on Windows, or without vLLM installed.
    """
    if args.vllm_mode == "server":
        return
    instead = "set use_vllm to false, as the built-in engine samples without vLLM"
    remote = "vllm_mode to server and vllm_server_base_url to a vLLM server"
    if sys.platform == "win32":
        raise UserError(f"vLLM does not run on Windows; {instead}, or set {remote} in WSL2 or on another machine.")
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"use_vllm is set, but vLLM is not installed; run `pip install vllm`, {instead}, or set {remote}."
        )


def vllm_engine(args: GRPOConfig, model: nn.Module, sampling: Sampling) -> VLLMEngine:
    """The engine that a training configuration asks for; a server is waited for.

    Raises:
        UserError: there is none, or it does not serve what is trained.
    """
    versions = AdapterVersions(model, args.vllm_adapter_dir or os.path.join(args.output_dir, "vllm_adapter"))
    if args.vllm_mode == "colocate":
        from lowvram_grpo.rollout.vllm_colocated import VLLMColocated, start_llm

        return VLLMColocated(sampling, versions, start_llm(args, versions), sleeps=args.vllm_enable_sleep_mode)
    name = unwrap(model).config._name_or_path
    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    client = VLLMClient(url, args.vllm_server_timeout, server_command(name or "MODEL", versions.rank))
    served = client.base_model(name, args.vllm_server_model)
    return VLLMServer(sampling, versions, client, served=served, server_folder=args.vllm_adapter_server_dir)
