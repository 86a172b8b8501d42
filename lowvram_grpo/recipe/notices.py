"""Settings that do nothing here, or something else than their digits say, and the sentence that tells so."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from lowvram_grpo.recipe.batch_plan import BatchPlan, step_notices

# Accepted so that a TRL script runs unchanged; each says on screen why it does nothing when it is set.
INERT_FIELDS = {
    "ds3_gather_for_generation": "DeepSpeed ZeRO-3 is not supported yet, so there are no sharded weights to gather",
    "cache_implementation": "rollouts choose their own KV cache",
    "dataloader_drop_last": "a smaller last batch is still whole groups",
    "dataloader_num_workers": "a row is only a prompt, which the main process reads at no cost",
    "log_unique_prompts": "one sample is shown a step, and completions.jsonl holds all",
    "num_completions_to_print": "one sample is shown a step, and completions.jsonl holds all",
    "neftune_noise_alpha": "noise on the embeddings would make the log-probs those of another policy",
    "label_smoothing_factor": "the loss is GRPO's, which has no labels",
    "group_by_length": "prompts come shuffled or in order (shuffle_dataset)",
    "train_sampling_strategy": "prompts come shuffled or in order (shuffle_dataset)",
    "bf16_full_eval": "evaluation computes as training does",
    "fp16_full_eval": "evaluation computes as training does",
    "fsdp_config": "more than one process is not supported yet",
    "torch_compile": "the sampler and the scorer do not go through the compiled forward",
    "cast_lm_head_to_fp32": "logits are always computed in float32 here, tile by tile",
    "use_liger_kernel": "the loss head is already fused here (fused_loss)",
    "use_transformers_continuous_batching": "rollouts have their own engine",
    "vllm_structured_outputs_regex": "completions are sampled without a grammar",
    "vllm_guided_decoding_regex": "completions are sampled without a grammar",
    "vllm_group_port": "weights go to vLLM as LoRA adapters, which takes no communicator",
    "vllm_device": "a colocated vLLM runs on the card that trains",
    "vllm_dtype": "vLLM takes the model's own dtype, and a server its --dtype",
    "vllm_enable_prefix_caching": "vLLM decides itself; no version of an adapter finds the cache of another",
    "vllm_tensor_parallel_size": "a colocated vLLM runs on one card, and a server takes --tensor-parallel-size",
}
_ONLY_SERVER = ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
                "vllm_adapter_server_dir", "vllm_server_model")  # fmt: skip
_ONLY_COLOCATED = ("vllm_model_impl", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization",
                   "vllm_max_model_length", "vllm_max_model_len")  # fmt: skip


def why_inert(name: str) -> str | None:
    """Why a field does nothing here; None where it does something."""
    return INERT_FIELDS.get(name)


# Not typed as a GRPOConfig: that module asks this one.
def notices_of(args: Any) -> list[str]:
    """One sentence for each setting of a GRPOConfig that has no effect, or another effect than its digits say."""
    default = {f.name: f.default for f in fields(args)}
    said = [
        f"{name} has no effect: {why}."
        for name, why in INERT_FIELDS.items()
        if name in default and getattr(args, name) != default[name]
    ]
    idle = [
        name
        for name in default
        if name.startswith("vllm_") and name not in INERT_FIELDS and not _vllm_reads(args, name)
        if getattr(args, name) != default[name]
    ]
    if idle:
        where = f"with vllm_mode {args.vllm_mode}" if args.use_vllm else "without use_vllm"
        said.append(f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect {where}.")
    said += step_notices(args)
    if args.importance_sampling_level == "sequence" and args.loss_type != "grpo":
        said.append(
            f"importance_sampling_level sequence with loss_type {args.loss_type} weighs each sequence by its "
            "length; loss_type grpo weighs all alike, as in the paper (GSPO)."
        )
    plan = BatchPlan.of(args)
    several = plan.completions_per_rollout // plan.updates_per_rollout > plan.micro_batch_size
    if args.top_entropy_quantile < 1 and several:
        said.append(
            "top_entropy_quantile takes the threshold of a whole step, which is therefore scored once more; with "
            "per_device_train_batch_size as large as the step it is read from the pass itself."
        )
    if args.top_p < 1 or args.top_k or args.min_p:
        said.append(
            "top_p, top_k and min_p bias the sampler: log-probs are those of the full softmax at this temperature."
        )
    if args.prompts_per_step and args.gradient_accumulation_steps > 1:
        said.append(
            f"prompts_per_step {args.prompts_per_step} sets the step; gradient_accumulation_steps has no effect."
        )
    if args.kl_estimator == "k1" and args.beta and not args.use_bias_correction_kl:
        said.append(
            "kl_estimator k1 measures the KL but does not restrain it: its expected gradient is zero; use k2 or k3."
        )
    if "paged" in str(args.optim) and sys.platform == "win32":
        said.append(f"optim {args.optim} pages through the driver, which fails on Windows; adamw_8bit does not.")
    if args.idle_backend is not None:
        said.append(f"ddp_backend {args.idle_backend} has no effect: one process trains.")
    if args.vram_gib is not None and args.device.type != "cuda":
        said.append("vram_gib has no effect without a CUDA device.")
    if args.emulated_bf16:
        said.append("this GPU has no bfloat16 in hardware; float16 is used instead.")
    if args.world_size > 1:
        said.append("more than one process is not supported yet; results are only tested on one.")
    return said


def _vllm_reads(args: Any, name: str) -> bool:
    return args.use_vllm and name not in (_ONLY_COLOCATED if args.vllm_mode == "server" else _ONLY_SERVER)
