"""GRPOConfig: transformers.TrainingArguments plus TRL's GRPO fields, with TRL's names and meaning.

Where TRL asks for batch sizes that divide each other, this config derives them: `prompts_per_step` prompts, times
`num_generations` completions each, are one optimizer step; `per_device_train_batch_size` only bounds how many of those
completions go through the model at once. `BatchPlan` holds the arithmetic.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from lowvram_grpo.errors import UserError, one_line
from lowvram_grpo.recipe.generation_kwargs import settle_generation_kwargs
from lowvram_grpo.recipe.ranges import TRAINING_RANGES, check_ranges
from lowvram_grpo.recipe.settings import check_built, check_choices, settle_best_model

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
KL_ESTIMATORS = ("k1", "k2", "k3", "exact")
SCALE_REWARDS = ("group", "batch", "none")
IMPORTANCE_LEVELS = ("token", "sequence")
SWITCH = ("auto", "on", "off")
HEAD_DTYPES = ("dense", "int8", "nf4")
KV_DTYPES = ("auto", "int8")
ATTENTIONS = ("auto", "sdpa", "xformers")
ADAPTER_MODES = ("auto", "fused", "merged", "off")
CORRECTION_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

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
VLLM_MODES = ("server", "colocate")
_ONLY_SERVER = ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
                "vllm_adapter_server_dir", "vllm_server_model")  # fmt: skip
_ONLY_COLOCATED = ("vllm_model_impl", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization",
                   "vllm_max_model_length", "vllm_max_model_len")  # fmt: skip


def why_inert(name: str) -> str | None:
    """Why a field does nothing here; None where it does something."""
    return INERT_FIELDS.get(name)


def _help(text: str, default: Any = None, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass(frozen=True)
class BatchPlan:
    """How one rollout becomes optimizer steps. All counts are per process.

    Attributes:
        prompts_per_rollout: prompts sampled from at once.
        num_generations: completions per prompt (G).
        updates_per_rollout: optimizer steps that share one rollout, each on its own slice of the completions.
        num_iterations: passes over the whole rollout (mu in the GRPO paper).
        micro_batch_size: completions in one forward and backward pass, at most.
    """

    prompts_per_rollout: int
    num_generations: int
    updates_per_rollout: int
    num_iterations: int
    micro_batch_size: int

    @property
    def completions_per_rollout(self) -> int:
        return self.prompts_per_rollout * self.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.updates_per_rollout * self.num_iterations


@dataclass
class GRPOConfig(TrainingArguments):
    """Everything `GRPOTrainer` needs to know. Field names and meaning are TRL's; fields of our own say so.

    Raises:
        UserError: a value outside its range, with the range.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "generation_kwargs",
                          "chat_template_kwargs"]  # fmt: skip

    # Model and data
    model_init_kwargs: dict[str, Any] | str | None = _help("Keyword arguments of AutoModelForCausalLM.from_pretrained.")
    trust_remote_code: bool = _help("Allow model and tokenizer code from the hub.", False)
    disable_dropout: bool = _help(
        "Set the adapter's dropout to 0 as well; the model's own is off in every pass anyway.", False
    )
    remove_unused_columns: bool | None = _help("Drop every column but `prompt`; rewards then see none.", False)
    shuffle_dataset: bool = _help("Shuffle the prompts each epoch.", True)
    max_prompt_length: int | None = _help("Longest prompt in tokens; longer ones are cut (docs/data.md).", 512)
    chat_template_kwargs: dict[str, Any] | str | None = _help("Extra arguments of the chat template.")

    # Batch
    prompts_per_step: int | None = _help(
        "(ours) Prompts per optimizer step and process. Unset: per_device_train_batch_size x "
        "gradient_accumulation_steps completions, as TRL counts them, rounded up to whole groups."
    )
    num_generations: int = _help("Completions per prompt (G).", 8)
    num_generations_eval: int | None = _help("Completions per prompt in evaluation; as in training when unset.")
    generation_batch_size: int | None = _help("Completions per rollout over all processes.")
    steps_per_generation: int | None = _help("Micro-batches of per_device_train_batch_size served by one rollout.")
    rollout_batch_size: int | None = _help("(ours) Completions sampled at once; unset: all of a rollout.")

    # Sampling
    temperature: float = _help("Softmax temperature of the sampler, and of every log-prob.", 0.9)
    top_p: float = _help("Nucleus probability mass; 1 switches it off.", 1.0)
    top_k: int | None = _help("Keep the k most likely tokens; 0 or None switches it off.", 0)
    min_p: float | None = _help("Drop tokens below this share of the most likely one.")
    repetition_penalty: float = _help("Above 1 discourages tokens already seen.", 1.0)
    max_completion_length: int = _help("Longest completion in tokens.", 256)
    generation_kwargs: dict[str, Any] | str | None = _help(
        "Further arguments of generate(), which then samples instead of our own loop."
    )
    cache_implementation: str | None = _help("(no effect)")
    use_transformers_continuous_batching: bool = _help("(no effect)", False)
    ds3_gather_for_generation: bool = _help("(no effect yet)", True)

    # vLLM (docs/vllm.md)
    use_vllm: bool = _help("Let vLLM sample the completions (docs/vllm.md).", False)
    vllm_mode: str = _help("server: a vLLM server that is running; colocate: vLLM on the card that trains.", "colocate")
    vllm_model_impl: str = _help("Implementation that a colocated vLLM runs: vllm or transformers.", "vllm")
    vllm_enable_sleep_mode: bool = _help("Let a colocated vLLM give its memory back between rollouts.", False)
    vllm_structured_outputs_regex: str | None = _help("(no effect)")
    vllm_guided_decoding_regex: str | None = _help("(no effect)")
    vllm_server_base_url: str | None = _help("Where the server is, http://host:port; unset: host and port below.")
    vllm_server_host: str = _help("Host of the server.", "0.0.0.0")
    vllm_server_port: int = _help("Port of the server.", 8000)
    vllm_server_timeout: float = _help("Seconds to wait for the server to come up, and for each answer.", 240.0)
    vllm_server_model: str | None = _help("(ours) Name under which the server serves the base model, if it differs.")
    vllm_adapter_dir: str | None = _help("(ours) Folder through which vLLM gets the adapter; unset: in output_dir.")
    vllm_adapter_server_dir: str | None = _help("(ours) That folder's path as the server sees it, if it differs.")
    vllm_group_port: int = _help("(no effect)", 51216)
    vllm_device: str | None = _help("(no effect)")
    vllm_dtype: str | None = _help("(no effect)")
    vllm_gpu_memory_utilization: float = _help("Share of the card's memory that a colocated vLLM takes.", 0.3)
    vllm_max_model_length: int | None = _help("Longest prompt and completion of a colocated vLLM; unset: as needed.")
    vllm_max_model_len: int | None = _help("TRL's earlier name of vllm_max_model_length.")
    vllm_enable_prefix_caching: bool | None = _help("(no effect)")
    vllm_tensor_parallel_size: int = _help("(no effect)", 1)
    vllm_importance_sampling_correction: bool = _help("Weigh vLLM's tokens by how likely they are here.", True)
    vllm_importance_sampling_mode: str = _help(
        "token_truncate, token_mask, sequence_truncate or sequence_mask (docs/vllm.md).", "sequence_mask"
    )
    vllm_importance_sampling_cap: float | None = _help("TRL's earlier name of vllm_importance_sampling_clip_max.")
    vllm_importance_sampling_clip_max: float | None = _help("Upper bound of that weight.", 3.0)
    vllm_importance_sampling_clip_min: float | None = _help("Lower bound of that weight.")

    # Objective
    learning_rate: float = _help("Peak learning rate.", 1e-6)
    beta: float = _help("Weight of the KL term; 0 runs without a reference.", 0.04)
    kl_estimator: str = _help(
        "(ours) KL estimator: k1, k2 or k3 from the sampled tokens (Schulman 2020); exact: over the whole vocabulary.",
        "k3",
    )
    num_iterations: int = _help("Optimization passes over one rollout (mu).", 1)
    epsilon: float = _help("Lower clip range of the probability ratio.", 0.2)
    epsilon_high: float | None = _help("Upper clip range; as epsilon when unset.")
    delta: float | None = _help("Upper bound of the ratio for negative advantages too (INTELLECT-2).")
    importance_sampling_level: str = _help("Ratio per token, or per sequence (GSPO).", "token")
    reward_weights: list[float] | None = _help("One weight per reward function; all 1 when unset.")
    scale_rewards: str = _help("Divide advantages by the std of the group, of the batch, or not.", "group")
    loss_type: str = _help("grpo, bnpo, dr_grpo or dapo: what the loss is averaged over.", "grpo")
    mask_truncated_completions: bool = _help("Leave completions that hit the length limit out of the loss.", False)
    sync_ref_model: bool = _help("Let the reference follow the policy.", False)
    ref_model_mixup_alpha: float = _help("Share of the policy mixed into the reference at each sync.", 0.6)
    ref_model_sync_steps: int = _help("Optimizer steps between two syncs.", 512)

    # Memory and safety (ours)
    fused_loss: str = _help(
        "(ours) Triton kernels for log-probs and loss: auto (where there is a GPU for them), on, or off.", "auto"
    )
    workspace_mib: int = _help("(ours) Scratch memory of the sweep over the vocabulary, in MiB.", 64)
    vram_gib: float | None = _help("(ours) Hard cap on this process's GPU memory in GiB; unset: what is free at start.")
    head_dtype: str = _help(
        "(ours) How lm_head (and the input embedding, where tied) is kept: dense, int8 in blocks of 64, or nf4.",
        "dense",
    )
    kv_cache_dtype: str = _help(
        "(ours) How rollouts keep keys and values: auto (as computed), or int8, with a scale a head and token.", "auto"
    )
    rollout_adapters: str = _help(
        "(ours) How rollouts run LoRA layers: fused, merged (into weights that are not quantized, which come back bit "
        "for bit), off (as peft does), or auto, which is fused.",
        "auto",
    )
    fused_ops: str = _help(
        "(ours) Kernels for norms, rotary positions, MLP gates, int8 heads and drawing, in rollouts and in training, "
        "where LoRA layers and 4-bit weights take fewer launches too: on, off (as transformers and peft do), or auto, "
        "which takes those that must be faster by count and pass a trial on this card.",
        "auto",
    )
    embedding_offload: bool = _help("(ours) Keep an untied input embedding in pinned host memory.", False)
    activation_offload: bool = _help(
        "(ours) Keep checkpointed activations in pinned host memory until the backward pass.", False
    )
    optimizer_offload: bool = _help("(ours) Keep the optimizer's moments in host memory.", False)
    mlp_tile: int | None = _help("(ours) Run each MLP over this many tokens at a time; unset: all at once.")
    attention: str = _help(
        "(ours) What attends where prompts are shared or prefilled: sdpa (PyTorch's), xformers, or auto, which takes "
        "xformers where sdpa has no fitting kernel; attn_implementation says it for all other passes.",
        "auto",
    )
    shared_prefix: str = _help(
        "(ours) Run a group's prompt once for all its completions in every scoring pass: auto, on, or off.", "auto"
    )
    oom_step_down: bool = _help("(ours) When memory runs out, take the next saver and redo the same work.", True)
    memory_probe: str = _help(
        "(ours) Before step 1, try the longest step that can come: auto (on a GPU), on, off.", "auto"
    )
    self_test: bool = _help(
        "(ours) Before step 1, compare sampled with scored log-probs and policy with reference.", True
    )
    signal_check: bool = _help("(ours) Say on the first rollouts whether there is anything to learn from.", True)
    cold_start: str = _help("(ours) Supervised warm-up on the references: off, auto, or a number of steps.", "off")
    cold_start_learning_rate: float = _help("(ours) Learning rate of the cold start.", 2e-4)
    cold_start_max_steps: int = _help("(ours) Upper bound of an automatic cold start.", 60)
    reward_timeout: float | None = _help("(ours) Seconds a reward function may take on one batch; unset: forever.")

    # Logging
    logging_steps: float = _help("Log every N optimizer steps.", 1)
    log_completions: bool = _help("Show a sample completion at each log; completions.jsonl is always written.", False)
    num_completions_to_print: int | None = _help("Completions shown at each log.")
    log_unique_prompts: bool = _help("Show each prompt once.", False)

    # TrainingArguments, with defaults for this job
    gradient_checkpointing: bool = _help("Recompute activations in the backward pass.", True)
    bf16: bool | None = _help("bfloat16 autocast; unset: on where the GPU has it in hardware.")
    use_liger_kernel: bool = _help("(no effect)", False)
    cast_lm_head_to_fp32: bool = _help("(no effect)", False)
    warmup_ratio: float | None = _help("Share of the steps used to warm the learning rate up.")

    def __post_init__(self):
        # True and False are what TRL's first versions took.
        self.scale_rewards = {"true": "group", "false": "none"}.get(str(self.scale_rewards).lower(), self.scale_rewards)
        self._check_ranges()
        self._settle_vllm()
        if self.warmup_ratio is not None and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio
        self._emulated_bf16 = bool(self.bf16) and not self.use_cpu and not _has_bf16()
        if self.bf16 is None or self._emulated_bf16:
            self.bf16, self.fp16 = _pick_autocast(self.fp16, self.use_cpu)
        # From here on checkpointing is ours to switch (policy.load), under one name in every transformers version.
        checkpointing = self.gradient_checkpointing or bool(getattr(self, "activation_checkpointing", None))
        self.gradient_checkpointing = None if hasattr(self, "activation_checkpointing") else False
        self._idle_backend = None
        if self.ddp_backend is not None and os.environ.get("WORLD_SIZE", "1") == "1":
            # transformers would look for the process group that it belongs to
            self._idle_backend, self.ddp_backend = self.ddp_backend, None
        check_choices(self)
        settle_best_model(self)
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, RuntimeError, OSError, NotImplementedError) as error:
            raise UserError(f"The training settings do not fit together: {one_line(error)}.") from error
        self.gradient_checkpointing = checkpointing
        check_built(self)
        if not self.use_vllm:  # which has arguments of its own
            self.generation_kwargs = settle_generation_kwargs(self.generation_kwargs, vars(self))
        if isinstance(self.cold_start, str) and self.cold_start.isdigit():
            self.cold_start = int(self.cold_start)

    def _check_ranges(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise UserError(message)

        def one_of(name: str, allowed: tuple[str, ...]) -> None:
            value = getattr(self, name)
            need(value in allowed, f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")

        check_ranges(vars(self), TRAINING_RANGES)
        one_of("loss_type", LOSS_TYPES)
        one_of("kl_estimator", KL_ESTIMATORS)
        one_of("scale_rewards", SCALE_REWARDS)
        one_of("importance_sampling_level", IMPORTANCE_LEVELS)
        one_of("fused_loss", SWITCH)
        one_of("head_dtype", HEAD_DTYPES)
        one_of("shared_prefix", SWITCH)
        one_of("attention", ATTENTIONS)
        one_of("kv_cache_dtype", KV_DTYPES)
        one_of("rollout_adapters", ADAPTER_MODES)
        one_of("fused_ops", SWITCH)
        one_of("memory_probe", SWITCH)
        one_of("vllm_mode", VLLM_MODES)
        one_of("vllm_importance_sampling_mode", CORRECTION_MODES)
        need(not (self.generation_batch_size and self.steps_per_generation),
             "generation_batch_size and steps_per_generation say the same thing; set one of them.")  # fmt: skip
        need(not self.auto_find_batch_size,
             "auto_find_batch_size does not fit GRPO; lower per_device_train_batch_size instead.")  # fmt: skip
        cold = str(self.cold_start)
        need(
            cold in ("auto", "off") or cold.isdigit(),
            f"cold_start is {cold!r}; it must be auto, off, or a number of steps.",
        )

    def _settle_vllm(self) -> None:
        """TRL's earlier names become the later ones; the bounds of the correction must leave room between them."""
        if self.vllm_importance_sampling_cap is not None:
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        if self.vllm_max_model_length is None:
            self.vllm_max_model_length = self.vllm_max_model_len
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise UserError(
                f"vllm_importance_sampling_clip_min is {low} and clip_max {high}; the first must be below the second."
            )
        if low is high is None and self.vllm_importance_sampling_mode.endswith("truncate"):
            raise UserError(
                f"vllm_importance_sampling_mode {self.vllm_importance_sampling_mode} needs a bound; set "
                "vllm_importance_sampling_clip_max."
            )

    def batch_plan(self) -> BatchPlan:
        """Derive prompts, updates and micro-batches from whichever of the fields were set. Never fails on divisibility:
        completions are rounded up to whole groups."""
        group, rows, accumulate = (
            self.num_generations,
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
        )
        per_step = self.prompts_per_step * group if self.prompts_per_step else rows * accumulate
        if self.steps_per_generation:
            per_rollout = max(per_step, rows * self.steps_per_generation)
        elif self.generation_batch_size:
            per_rollout = max(per_step, self.generation_batch_size // max(self.world_size, 1))
        else:
            per_rollout = per_step
        prompts = math.ceil(per_rollout / group)
        updates = max(1, round(prompts * group / max(per_step, 1))) if per_rollout > per_step else 1
        return BatchPlan(prompts, group, updates, self.num_iterations, max(1, min(rows, prompts * group)))

    def notices(self) -> list[str]:
        """One sentence for each setting that has no effect, or another effect than its digits say."""
        default = {f.name: f.default for f in fields(type(self))}
        said = [
            f"{name} has no effect: {why}."
            for name, why in INERT_FIELDS.items()
            if name in default and getattr(self, name) != default[name]
        ]
        idle = [
            name
            for name in default
            if name.startswith("vllm_") and name not in INERT_FIELDS and not self._vllm_reads(name)
            if getattr(self, name) != default[name]
        ]
        if idle:
            where = f"with vllm_mode {self.vllm_mode}" if self.use_vllm else "without use_vllm"
            said.append(f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect {where}.")
        said += self._step_notices()
        if self.importance_sampling_level == "sequence" and self.loss_type != "grpo":
            said.append(
                f"importance_sampling_level sequence with loss_type {self.loss_type} weighs each sequence by its "
                "length; loss_type grpo weighs all alike, as in the paper (GSPO)."
            )
        if self.top_p < 1 or self.top_k or self.min_p:
            said.append(
                "top_p, top_k and min_p bias the sampler: log-probs are those of the full softmax at this temperature."
            )
        if self.prompts_per_step and self.gradient_accumulation_steps > 1:
            said.append(
                f"prompts_per_step {self.prompts_per_step} sets the step; gradient_accumulation_steps has no effect."
            )
        if self.kl_estimator == "k1" and self.beta:
            said.append(
                "kl_estimator k1 measures the KL but does not restrain it: its expected gradient is zero; use k2 or k3."
            )
        if "paged" in str(self.optim) and sys.platform == "win32":
            said.append(f"optim {self.optim} pages through the driver, which fails on Windows; adamw_8bit does not.")
        if self._idle_backend is not None:
            said.append(f"ddp_backend {self._idle_backend} has no effect: one process trains.")
        if self.vram_gib is not None and self.device.type != "cuda":
            said.append("vram_gib has no effect without a CUDA device.")
        if self._emulated_bf16:
            said.append("this GPU has no bfloat16 in hardware; float16 is used instead.")
        if self.world_size > 1:
            said.append("more than one process is not supported yet; results are only tested on one.")
        return said

    def _step_notices(self) -> list[str]:
        """Where a step has another number of completions than the batch fields multiply to."""
        plan, group = self.batch_plan(), self.num_generations
        asked = self.per_device_train_batch_size * self.gradient_accumulation_steps
        per_step = self.prompts_per_step * group if self.prompts_per_step else asked
        total, updates = plan.completions_per_rollout, plan.updates_per_rollout
        if total == updates * per_step:
            return []
        if not (self.steps_per_generation or self.generation_batch_size):
            return [f"{per_step} completions a step do not make whole groups of {group}; a step uses {total}."]
        name = "generation_batch_size" if self.generation_batch_size else "steps_per_generation"
        counts = " or ".join(map(str, sorted({total // updates, -(-total // updates)})))
        return [
            f"with {name} {getattr(self, name)} a rollout has {total} completions, which make no whole number of steps "
            f"of {per_step}; a step uses {counts}."
        ]

    def _vllm_reads(self, name: str) -> bool:
        return self.use_vllm and name not in (_ONLY_COLOCATED if self.vllm_mode == "server" else _ONLY_SERVER)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)


def _has_bf16() -> bool:
    """Whether bfloat16 is in the silicon. `torch.cuda.is_bf16_supported()` also says yes to emulation."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8


def _pick_autocast(fp16: bool, use_cpu: bool) -> tuple[bool, bool]:
    """(bf16, fp16) for this device: bf16 from Ampere on, fp16 on older GPUs, float32 on a CPU."""
    if fp16 or use_cpu or not torch.cuda.is_available():
        return False, fp16
    return _has_bf16(), not _has_bf16()
