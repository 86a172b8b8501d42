"""vLLM's own engine on the card that trains, for those who have it installed and room for a second copy of the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapter_versions import AdapterVersions, Version
from lowvram_grpo.rollout.vllm_base import Completion, VLLMEngine
from lowvram_grpo.rollout.vllm_client import allowed_rank

if TYPE_CHECKING:
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.rollout.sampler import Sampling


class VLLMColocated(VLLMEngine):
    """vLLM's own engine on the card that trains.

    Args:
        llm: a `vllm.LLM` with LoRA enabled.
        sleeps: it was made with sleep mode, and gives its memory back between rollouts.
    """

    def __init__(self, sampling: Sampling, versions: AdapterVersions, llm: Any, *, sleeps: bool = False):
        super().__init__(sampling, versions)
        self.llm, self.sleeps = llm, sleeps
        if sleeps:
            llm.sleep(level=1)

    def _max_model_len(self) -> int | None:
        return self.llm.llm_engine.model_config.max_model_len

    def _load_adapter(self, version: Version, before: Version | None) -> None:
        """Nothing yet: an adapter comes with the request, and vLLM drops the one before for it."""

    def _complete(self, prompts: list[list[int]], group: int, seeds: list[int]) -> Sequence[list[Completion]]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        version = self.versions.current
        params = [SamplingParams(n=group, seed=seed, **self._sampling_params()) for seed in seeds]
        if self.sleeps:
            self.llm.wake_up()
        try:
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                params,
                lora_request=LoRARequest(version.name, version.number, str(version.folder)),
                use_tqdm=False,
            )
        finally:
            if self.sleeps:
                self.llm.sleep(level=1)
        return [[_completion(out) for out in output.outputs] for output in outputs]


def _completion(out: Any) -> Completion:
    ids = list(out.token_ids)
    return Completion(ids, [step[i].logprob for step, i in zip(out.logprobs, ids)], out.finish_reason == "stop")


def start_llm(args: GRPOConfig, versions: AdapterVersions) -> Any:
    """A `vllm.LLM` of the base model, with room for the adapter.

    Raises:
        UserError: it does not start, for want of memory most often.
    """
    from vllm import LLM

    base = unwrap(versions.model)
    longest = None if args.max_prompt_length is None else args.max_prompt_length + args.max_completion_length
    try:
        return LLM(
            model=base.config._name_or_path,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=allowed_rank(versions.rank),
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_len=args.vllm_max_model_length or longest,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            quantization="bitsandbytes" if getattr(base, "is_quantized", False) else None,
            logprobs_mode="processed_logprobs",
            trust_remote_code=args.trust_remote_code,
            seed=0,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"vLLM did not start in this process ({one_line(error)}); change vllm_gpu_memory_utilization, run it as a "
            "server (vllm_mode server), or set use_vllm to false."
        ) from error
