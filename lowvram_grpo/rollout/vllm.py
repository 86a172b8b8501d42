"""vLLM as the training configuration asks for it: a server that a person has started, or its engine on the card that
trains."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapter_versions import AdapterVersions, Version
from lowvram_grpo.rollout.vllm_base import Completion, VLLMEngine
from lowvram_grpo.rollout.vllm_client import VLLMClient, server_command

if TYPE_CHECKING:
    from torch import nn

    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.rollout.sampler import Sampling

_REQUESTS_AT_ONCE = 32
# Far from 1, so that log-probs that know of the temperature differ plainly from those that do not.
_HIGH_TEMPERATURE = 50.0
_RAW_SENTENCE = (
    "{} reports log-probs before the temperature, and training compares them with its own at temperature {:g}; start "
    "the server with --logprobs-mode processed_logprobs, or set temperature to 1."
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
        self._mode_checked = sampling.temperature in (0.0, 1.0)

    def _max_model_len(self) -> int | None:
        return self.served.get("max_model_len")

    def _load_adapter(self, version: Version, before: Version | None) -> None:
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
        self._check_logprobs_mode(prompts[0])
        one = lambda prompt, seed: self._completions(self.client.complete(self._request(prompt, n=group, seed=seed)))
        with ThreadPoolExecutor(min(_REQUESTS_AT_ONCE, len(prompts))) as pool:
            return list(pool.map(one, prompts, seeds))

    def _request(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        fixed = {"model": self.versions.current.name, "prompt": prompt, "return_token_ids": True, "stream": False}
        return {**fixed, **self._sampling_params(), **more}

    def _completions(self, choices: list[dict[str, Any]]) -> list[Completion]:
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

    def _check_logprobs_mode(self, prompt: list[int]) -> None:
        """Whether log-probs know of the temperature: a server does not tell, but the most likely token's log-prob at
        another temperature does."""
        if self._mode_checked:
            return
        cold, hot = (self._best_logp(prompt, temperature) for temperature in (1.0, _HIGH_TEMPERATURE))
        if abs(cold - hot) < 0.05:  # two answers of one server differ by rounding
            where = f"The vLLM server at {self.client.url}"
            raise UserError(_RAW_SENTENCE.format(where, self.sampling.temperature))
        self._mode_checked = True

    def _best_logp(self, prompt: list[int], temperature: float) -> float:
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logit_bias": None}
        once = {"n": 1, "seed": 0, "max_tokens": 1, "min_tokens": 0, "logprobs": 1, "temperature": temperature}
        [choice] = self.client.complete(self._request(prompt, **plain, **once))
        return max((choice["logprobs"]["top_logprobs"][0] or {"": 0.0}).values())


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
