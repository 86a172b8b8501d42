"""GRPOConfig: transformers.TrainingArguments plus TRL's GRPO fields, with TRL's names and meaning.

Where TRL asks for batch sizes that divide each other, this config derives them: `prompts_per_step` prompts, times
`num_generations` completions each, are one optimizer step; `per_device_train_batch_size` only bounds how many of those
completions go through the model at once. `batch_plan` has the arithmetic.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from lowvram_grpo.errors import UserError, did_you_mean, one_line
from lowvram_grpo.objective import LOSS_TYPES
from lowvram_grpo.recipe.batch_plan import BatchPlan
from lowvram_grpo.recipe.combinations import check_combinations
from lowvram_grpo.recipe.expert_offload import settled as settled_experts
from lowvram_grpo.recipe.generation_kwargs import settle_generation_kwargs
from lowvram_grpo.recipe.notices import notices_of
from lowvram_grpo.recipe.ranges import TRAINING_RANGES, check_numbers, check_ranges, settled_padding
from lowvram_grpo.recipe.settings import check_built, check_choices, settle_best_model
from lowvram_grpo.recipe.unknown_names import Arguments, check_names
from lowvram_grpo.recipe.weight_offload import settled

CORRECTION_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
_SWITCH = ("auto", "on", "off")
# The words that a field may have.
_CHOICES = {
    "loss_type": LOSS_TYPES,
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "kl_estimator": ("k1", "k2", "k3", "exact"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "fused_loss": _SWITCH,
    "head_dtype": ("dense", "int8", "nf4"),
    "shared_prefix": _SWITCH,
    "curriculum": ("off", "easy_first", "hard_first", "medium_first"),
    "attention": ("auto", "sdpa", "xformers"),
    "kv_cache_dtype": ("auto", "int8"),
    "rollout_adapters": ("auto", "fused", "merged", "off"),
    "fused_ops": _SWITCH,
    "memory_probe": _SWITCH,
    "reward_errors": ("stop", "none"),
    "reward_model_device": ("auto", "cuda", "cpu", "in_turn"),
    "vllm_mode": ("server", "colocate"),
    "vllm_importance_sampling_mode": CORRECTION_MODES,
}
# What others take for a loss of its own.
_CHOSEN_ELSEWHERE = {
    "gspo": " (write importance_sampling_level sequence, with loss_type grpo)",
    "gspo_token": " (write importance_sampling_level sequence, with loss_type grpo)",
    "gdpo": " (write multi_objective_aggregation normalize_then_sum, with loss_type grpo)",
}


def _help(text: str, default: Any = None, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class GRPOConfig(TrainingArguments):
    """Everything `GRPOTrainer` needs to know. Field names and meaning are TRL's; fields of our own say so.

    Raises:
        UnknownSetting: no field has such a name; a TypeError too, and it says what to write instead.
        UserError: a value outside its range, with the range.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "generation_kwargs",
                          "chat_template_kwargs", "transformers_continuous_batching_config"]  # fmt: skip
    # Of the arguments by name: __new__ takes any, to say which it does not know.
    __signature__ = Arguments()

    def __new__(cls, *args: Any, **kwargs: Any):
        check_names(cls, kwargs)
        return super().__new__(cls)

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
    transformers_continuous_batching_config: dict[str, Any] | str | None = _help("(no effect)")
    use_transformers_paged: bool = _help("TRL's earlier name of the flag above. (no effect)", False)
    max_tool_calling_iterations: int | None = _help(
        "Turns of one completion whose calls of tools are answered, at most."
    )
    pad_to_multiple_of: int | str | None = _help("(no effect)", "auto")
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
    multi_objective_aggregation: str = _help(
        "sum_then_normalize: weigh and add the rewards, then normalize; normalize_then_sum: the reverse (GDPO).",
        "sum_then_normalize",
    )
    loss_type: str = _help(
        "grpo, bnpo, dr_grpo, dapo, luspo: what the clipped loss is averaged over; cispo, sapo, vespo: losses that "
        "clip in another way.",
        "grpo",
    )
    use_bias_correction_kl: bool = _help(
        "Multiply the sampled KL by the ratio, so that its gradient is unbiased (DeepSeek-V3.2); off: plain k3.", True
    )
    sapo_temperature_neg: float = _help("Temperature of sapo's gate where the advantage is not positive.", 1.05)
    sapo_temperature_pos: float = _help("Temperature of sapo's gate where the advantage is positive.", 1.0)
    vespo_k_pos: float = _help("Shape k of vespo's weight where the advantage is not negative.", 2.0)
    vespo_lambda_pos: float = _help("Rate lambda of vespo's weight where the advantage is not negative.", 3.0)
    vespo_k_neg: float = _help("Shape k of vespo's weight where the advantage is negative.", 3.0)
    vespo_lambda_neg: float = _help("Rate lambda of vespo's weight where the advantage is negative.", 2.0)
    off_policy_mask_threshold: float | None = _help(
        "Leave completions of negative advantage out of the policy loss once the sampler's mean log-prob exceeds the "
        "policy's by more than this (DeepSeek-V3.2)."
    )
    top_entropy_quantile: float = _help("Share of the tokens, by entropy, that the policy loss counts.", 1.0)
    entropy_coef: float = _help("Weight of the entropy bonus; the starting one where it adapts.", 0.0)
    use_adaptive_entropy: bool = _help("Adapt entropy_coef to keep the entropy at entropy_target.", False)
    entropy_coef_min: float = _help("Lower bound of an adaptive entropy_coef.", 0.0)
    entropy_coef_max: float = _help("Upper bound of an adaptive entropy_coef.", 1.0)
    entropy_coef_delta: float = _help("Step of an adaptive entropy_coef, one an optimizer step.", 0.005)
    entropy_target: float = _help("Mean entropy in nats below which the adaptive bonus applies and grows.", 0.2)
    router_aux_loss_coef: float | None = _help(
        "Weight of a mixture of experts' load-balancing loss; unset: the model's own; 0 switches it off."
    )
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
        "(ours) Kernels for norms, rotary positions, MLP gates, recurrences, int8 heads and drawing, in rollouts and "
        "training, where LoRA and 4-bit weights take fewer launches: on, off (as transformers and peft do) or auto, "
        "which takes those that must be faster by count and pass a trial on this card.",
        "auto",
    )
    embedding_offload: bool = _help(
        "(ours) Keep an untied input embedding, and per-layer inputs (Gemma 3n, 4), in host memory.", False
    )
    activation_offload: bool = _help(
        "(ours) Keep checkpointed activations in pinned host memory until the backward pass.", False
    )
    optimizer_offload: bool = _help("(ours) Keep the optimizer's moments in host memory.", False)
    reference_offload: bool = _help(
        "(ours) Where all weights are trained, keep the reference in pinned host memory and stream it layer by layer.",
        False,
    )
    expert_offload: str = _help("(ours) Experts of a layer without a place on the card: off, a number, or auto.", "off")
    weight_offload: str = _help("(ours) Decoder layers streamed from host memory: off, a number, or auto.", "off")
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
    resample_dead_groups: int = _help(
        "(ours) Sample groups whose rewards are all equal anew, from other prompts, at most so many times a rollout "
        "(DAPO's dynamic sampling); 0: never.",
        0,
    )
    curriculum: str = _help(
        "(ours) Order of an epoch's prompts by pass rate: off, easy_first, hard_first, medium_first; from a column "
        "pass_rate or difficulty of the data, else as the run measures it, from its second epoch on.",
        "off",
    )
    cold_start: str = _help("(ours) Supervised warm-up on the references: off, auto, or a number of steps.", "off")
    cold_start_learning_rate: float = _help("(ours) Learning rate of the cold start.", 2e-4)
    cold_start_max_steps: int = _help("(ours) Upper bound of an automatic cold start.", 60)
    reward_timeout: float | None = _help("(ours) Seconds a reward function may take on one batch; unset: forever.")
    reward_errors: str = _help(
        "(ours) What a reward function that fails does: stop ends the run, which can be resumed; none: the function is "
        "asked again, for one completion at a time, and what fails is None.",
        "stop",
    )
    reward_model_device: str = _help(
        "(ours) Where reward models are kept and run: cuda; cpu; in_turn (kept in host memory, brought to the card one "
        "after another after each rollout); or auto, which is cuda where the memory plan finds room, else in_turn.",
        "auto",
    )

    early_stopping: int = _help(
        "(ours) End the run once so many evaluations in a row were no better by metric_for_best_model; 0: never.", 0
    )
    early_stopping_threshold: float = _help("(ours) By how much an evaluation must be better to count as such.", 0.0)

    # Logging
    logging_steps: float = _help("Log every N optimizer steps.", 1)
    log_completions: bool = _help("Show a completion of each rollout, and give trackers tables of them.", False)
    num_completions_to_print: int | None = _help("Completions of a rollout that are shown; the best one when unset.")
    log_unique_prompts: bool = _help("Give trackers' tables each prompt once.", False)
    log_multimodal: bool = _help("(no effect)", True)
    log_completions_hub_repo: str | None = _help(
        "Dataset on the hub that gets the completions, a table a log, with log_completions; it is public unless "
        "hub_private_repo is set."
    )

    # TrainingArguments, with defaults for this job
    gradient_checkpointing: bool = _help("Recompute activations in the backward pass.", True)
    bf16: bool | None = _help("bfloat16 autocast; unset: on where the GPU has it in hardware.")
    use_liger_kernel: bool = _help("(no effect)", False)
    cast_lm_head_to_fp32: bool = _help("(no effect)", False)
    warmup_ratio: float | None = _help("Share of the steps used to warm the learning rate up.")

    def __post_init__(self):
        # True and False are what TRL's first versions took.
        self.scale_rewards = {"true": "group", "false": "none"}.get(str(self.scale_rewards).lower(), self.scale_rewards)
        self.pad_to_multiple_of = settled_padding(self.pad_to_multiple_of)
        self.expert_offload, self.weight_offload = settled_experts(self.expert_offload), settled(self.weight_offload)
        self._check_ranges()
        self._settle_vllm()
        if self.warmup_ratio is not None and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio
        self.emulated_bf16 = bool(self.bf16) and not self.use_cpu and not _has_bf16()
        if self.bf16 is None or self.emulated_bf16:
            self.bf16, self.fp16 = _pick_autocast(self.fp16, self.use_cpu)
        # From here on checkpointing is ours to switch (policy.build), under one name in every transformers version.
        checkpointing = self.gradient_checkpointing or bool(getattr(self, "activation_checkpointing", None))
        self.gradient_checkpointing = None if hasattr(self, "activation_checkpointing") else False
        self.idle_backend = None
        if self.ddp_backend is not None and os.environ.get("WORLD_SIZE", "1") == "1":
            # transformers would look for the process group that it belongs to
            self.idle_backend, self.ddp_backend = self.ddp_backend, None
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

        check_numbers(self)
        check_ranges(vars(self), TRAINING_RANGES)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            near = _CHOSEN_ELSEWHERE.get(str(value)) or did_you_mean(str(value), allowed)
            need(value in allowed, f"{name} is {value!r}{near}; it must be one of {', '.join(allowed)}.")
        need(not (self.generation_batch_size and self.steps_per_generation),
             "generation_batch_size and steps_per_generation say the same thing; set one of them.")  # fmt: skip
        cold = str(self.cold_start)
        need(cold in ("auto", "off") or cold.isdigit(),
             f"cold_start is {cold!r}; it must be auto, off, or a number of steps.")  # fmt: skip
        check_combinations(self)

    def _settle_vllm(self) -> None:
        """TRL's earlier names become the later ones; the bounds of the correction must leave room between them."""
        if self.vllm_importance_sampling_cap is not None:
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        self.vllm_max_model_length = self.vllm_max_model_length or self.vllm_max_model_len
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

    @property
    def entropy_bonus(self) -> bool:
        """Whether the loss has an entropy term, an adaptive one that is 0 by now included."""
        return bool(self.entropy_coef) or self.use_adaptive_entropy

    def batch_plan(self) -> BatchPlan:
        """What whichever of the batch fields were set come to."""
        return BatchPlan.of(self)

    def notices(self) -> list[str]:
        """One sentence for each setting that has no effect, or another effect than its digits say."""
        return notices_of(self)

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
