"""Settings that do nothing here, or something else than their digits say, and the sentence that tells so."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from typing import Any

from lowvram_grpo.recipe.batch_plan import step_notices
from lowvram_grpo.recipe.combinations import combination_notices

_ONE_PROCESS = "one process trains"
_LOADER = "a row is only a prompt, and workers (dataloader_num_workers) run as PyTorch has them by default"
_EVALUATION = "an evaluation samples and rewards completions, and keeps no outputs of the model"
_COMPILED = "the sampler and the scorer do not go through the compiled forward"

# Accepted so that a TRL script runs unchanged; each says on screen why it does nothing when it is set.
INERT_FIELDS = {
    "pad_to_multiple_of": "masks keep padding out of all sums, and no kernel here is faster by it",
    "log_multimodal": "prompts and completions are text here",
    "transformers_continuous_batching_config": "rollouts have their own engine",
    "use_transformers_paged": "rollouts have their own engine",
    **dict.fromkeys(
        (
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
            "dataloader_pin_memory",
        ),
        _LOADER,
    ),
    **dict.fromkeys(
        (
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_timeout",
            "average_tokens_across_devices",
            "log_on_each_node",
            "save_on_each_node",
            "log_level_replica",
        ),
        _ONE_PROCESS,
    ),
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "batch_eval_metrics",
            "include_for_metrics",
            "label_names",
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILED),
    "length_column_name": "prompts come shuffled or in order (shuffle_dataset)",
    "include_num_input_tokens_seen": "the tokens are always counted (num_tokens)",
    "liger_kernel_config": "the loss head and the norms are already fused here (fused_loss, fused_ops)",
    "use_cache": "rollouts have a cache, and no other pass has",
    "do_predict": "it is for scripts to read, and GRPOTrainer does not",
    "resume_from_checkpoint": "it is for scripts to pass to trainer.train(); `lowvram-grpo train` has --resume",
    "accelerator_config": "one process trains, and it reads the prompts itself",
    "ds3_gather_for_generation": "DeepSpeed ZeRO-3 is not supported yet, so there are no sharded weights to gather",
    "cache_implementation": "rollouts choose their own KV cache",
    "dataloader_drop_last": "a smaller last batch is still whole groups",
    "neftune_noise_alpha": "noise on the embeddings would make the log-probs those of another policy",
    "label_smoothing_factor": "the loss is GRPO's, which has no labels",
    "group_by_length": "prompts come shuffled or in order (shuffle_dataset)",
    "train_sampling_strategy": "prompts come shuffled or in order (shuffle_dataset)",
    "bf16_full_eval": "evaluation computes as training does",
    "fp16_full_eval": "evaluation computes as training does",
    "fsdp_config": "more than one process is not supported yet",
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


# Not typed as a GRPOConfig: that module asks this one.
def notices_of(args: Any) -> list[str]:
    """One sentence for each setting of a GRPOConfig that has no effect, or another effect than its digits say."""
    default = {f.name: f.default for f in fields(args)}
    inert: dict[str, list[str]] = {}
    for name, why in INERT_FIELDS.items():
        if name in default and _is_set(args, name, default[name]):
            inert.setdefault(why, []).append(name)
    said = [
        f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect: {why}." for why, names in inert.items()
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
    said += combination_notices(args)
    if args.top_p < 1 or args.top_k or args.min_p:
        said.append(
            "top_p, top_k and min_p bias the sampler: log-probs are those of the full softmax at this temperature."
        )
    if args.num_completions_to_print is not None and not args.log_completions:
        said.append("num_completions_to_print has no effect without log_completions.")
    if args.log_unique_prompts and not (
        args.log_completions and {"wandb", "trackio", "tensorboard"} & {*args.report_to}
    ):
        said.append(
            "log_unique_prompts has no effect: it is about the tables of completions that log_completions gives to "
            "wandb, trackio and tensorboard (report_to)."
        )
    if args.early_stopping and not args.load_best_model_at_end:
        said.append("early_stopping without load_best_model_at_end leaves the last weights, not the best ones.")
    if args.early_stopping_threshold and not args.early_stopping:
        said.append("early_stopping_threshold has no effect without early_stopping.")
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


def _is_set(args: Any, name: str, default: Any) -> bool:
    """Whether somebody has set a field; what its configuration settles by itself, and None, do not count."""
    if name == "dataloader_pin_memory" and args.use_cpu:
        return False
    value = getattr(args, name)
    if name == "accelerator_config":  # which is always made into one
        default = type(value)()
    return value != default and bool(value if default is MISSING else value is not None)


def _vllm_reads(args: Any, name: str) -> bool:
    return args.use_vllm and name not in (_ONLY_COLOCATED if args.vllm_mode == "server" else _ONLY_SERVER)
