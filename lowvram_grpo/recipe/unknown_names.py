"""Names that are no settings here but elsewhere, and what to write instead: of TRL's earlier versions, of transformers
4, Unsloth, verl, OpenRLHF and PPO, of a recipe, and of the trainer's own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from lowvram_grpo.errors import UnknownSetting, did_you_mean, flag_of
from lowvram_grpo.rewards.settings import ARGUMENTS, RewardSettings

# Our name -> those that others have for it.
_OTHERS = {
    "max_completion_length": "max_new_tokens max_tokens response_length max_response_length max_response_len "
    "completion_length max_output_length generate_max_len max_gen_len",
    "max_prompt_length": "prompt_length max_input_length max_prompt_len prompt_max_len max_source_length",
    "num_generations": "num_samples num_return_sequences n rollout_n group_size num_completions n_samples_per_prompt "
    "num_generations_per_prompt num_rollouts samples_per_prompt",
    "beta": "kl_coef kl_coeff kl_loss_coef init_kl_coef kl_beta kl_weight kl_penalty_coef",
    "kl_estimator": "kl_loss_type kl_type kl_penalty",
    "epsilon": "cliprange clip_range clip_ratio clip_ratio_low clip_eps clip_epsilon eps_clip epsilon_low",
    "epsilon_high": "clip_ratio_high cliprange_high eps_clip_high epsilon_max clip_higher",
    "delta": "clip_ratio_c dual_clip",
    "num_iterations": "ppo_epochs num_ppo_epochs mu updates_per_rollout",
    "learning_rate": "lr actor_learning_rate actor_lr",
    "num_train_epochs": "epochs num_epochs total_epochs",
    "max_steps": "steps num_steps total_training_steps num_train_steps",
    "prompts_per_step": "train_batch_size rollout_prompts data_train_batch_size",
    "per_device_train_batch_size": "batch_size micro_batch_size mini_batch_size ppo_mini_batch_size "
    "ppo_micro_batch_size ppo_micro_batch_size_per_gpu micro_train_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "rollout_batch_size": "micro_rollout_batch_size local_rollout_forward_batch_size generation_micro_batch_size",
    "entropy_coef": "entropy_coeff ent_coef entropy_beta entropy_loss_coef entropy_bonus_coef entropy_bonus",
    "scale_rewards": "scale_advantages whiten_rewards normalize_advantages advantage_normalization "
    "norm_adv_by_std_in_grpo",
    "loss_type": "loss_agg_mode loss loss_fn policy_loss",
    "importance_sampling_level": "importance_sampling ratio_level",
    "max_grad_norm": "grad_clip gradient_clip_val gradient_clipping max_gradient_norm",
    "mask_truncated_completions": "overlong_filtering mask_truncated missing_eos_penalty",
    "generation_kwargs": "generation_config sampling_params vllm_sampling_params stop stop_strings stop_token_ids",
    "gradient_checkpointing": "use_gradient_checkpointing enable_gradient_checkpointing",
    "fused_loss": "use_liger_loss use_fused_loss use_fused_kernels",
    "workspace_mib": "unsloth_num_chunks unsloth_grpo_mini_batch unsloth_logit_chunk_multiplier logits_chunk_size",
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_server_base_url": "vllm_server_url vllm_base_url",
    "early_stopping": "early_stopping_patience early_stop patience",
    "use_cpu": "no_cuda",
    "bf16": "use_bf16 mixed_precision",
    "fp16": "use_fp16 fp16_opt_level fp16_backend half_precision_backend",
    "train_sampling_strategy": "group_by_length",
    "warmup_steps": "num_warmup_steps lr_warmup_steps",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "optim": "optimizer",
    "report_to": "logger log_with",
}
_RENAMED = {name: ours for ours, names in _OTHERS.items() for name in names.split()}

_NF4 = "quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
_TO_TRAINER = "pass {} to GRPOTrainer"


def _by_name(table: Mapping[str, str]) -> dict[str, str]:
    return {name: advice for names, advice in table.items() for name in names.split()}


# In a script: what belongs to the trainer, to its other arguments, or nowhere.
_ELSEWHERE = _by_name({
    "model model_name model_name_or_path model_id pretrained": "the model is the first argument of GRPOTrainer",
    "model_revision revision": "write it into model_init_kwargs={'revision': ...}",
    "torch_dtype dtype": "write it into model_init_kwargs={'dtype': ...}",
    "attn_implementation": "write it into model_init_kwargs={'attn_implementation': ...}",
    "reward reward_funcs reward_functions reward_fn reward_model": _TO_TRAINER.format("reward_funcs=..."),
    "tokenizer processing_class processor": _TO_TRAINER.format("processing_class=..."),
    "reward_processing_classes callbacks optimizers peft_config quantization_config observer ladder":
        _TO_TRAINER.format("it"),
    "train_dataset eval_dataset tools environment_factory rollout_func": _TO_TRAINER.format("it"),
    "environment": _TO_TRAINER.format("environment_factory=..."),
    "dataset": _TO_TRAINER.format("train_dataset=..."),
    "data dataset_name dataset_config data_config split dataset_train_split dataset_test_split eval_data eval_split":
        "load the dataset, and " + _TO_TRAINER.format("train_dataset=... (eval_dataset=...)"),
    "data_weights dataset_mixture":
        "mix the datasets (datasets.interleave_datasets, concatenate_datasets), and "
        + _TO_TRAINER.format("train_dataset=..."),
    "stream streaming": "load the dataset with streaming=True, and " + _TO_TRAINER.format("train_dataset=..."),
    "prompt_column answer_column dataset_prompt_column dataset_text_field":
        "rename the dataset's column to prompt; every other column reaches the rewards under its own name",
    "bnb_config load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant qlora": _TO_TRAINER.format(_NF4),
    "load_in_8bit": _TO_TRAINER.format("quantization_config=BitsAndBytesConfig(load_in_8bit=True)"),
    "use_peft use_lora lora lora_task_type": _TO_TRAINER.format("peft_config=LoraConfig(...)"),
    "adapter adapter_name_or_path": _TO_TRAINER.format("PeftModel.from_pretrained(..., is_trainable=True)"),
    "lora_r lora_rank max_lora_rank r": _TO_TRAINER.format("peft_config=LoraConfig(r=...)"),
    "lora_alpha": _TO_TRAINER.format("peft_config=LoraConfig(lora_alpha=...)"),
    "lora_dropout": _TO_TRAINER.format("peft_config=LoraConfig(lora_dropout=...)"),
    "lora_target_modules target_modules": _TO_TRAINER.format("peft_config=LoraConfig(target_modules=...)"),
    "lora_modules_to_save": _TO_TRAINER.format("peft_config=LoraConfig(modules_to_save=...)"),
    "use_rslora": _TO_TRAINER.format("peft_config=LoraConfig(use_rslora=...)"),
    "use_dora": _TO_TRAINER.format("peft_config=LoraConfig(use_dora=...)"),
    "evaluation_strategy": "write eval_strategy",
    "hub_model_revision": "write hub_revision",
    "wandb_log_unique_prompts": "write log_unique_prompts",
    "wandb_project": "drop it, and set the environment variable WANDB_PROJECT",
    "wandb_entity": "drop it, and set the environment variable WANDB_ENTITY",
    "wandb_run_group": "drop it, and set the environment variable WANDB_RUN_GROUP",
    "system_prompt": "put it into the prompts as their first message",
    "few_shot template": "put it into the prompts",
    "chat_template": "set tokenizer.chat_template, and " + _TO_TRAINER.format("processing_class=tokenizer"),
    "preset memory_plan": "it belongs to `lowvram-grpo train`; in a script set the fields of docs/memory.md",
    "resume": "call trainer.train(resume_from_checkpoint=True)",
    "plain": "it belongs to `lowvram-grpo train`",
    " ".join([*ARGUMENTS, *(field.name for field in fields(RewardSettings))]):
        "it is a reward's: pass reward_funcs=get_reward_funcs(GRPOScriptArguments(...)) to GRPOTrainer, both of "
        "lowvram_grpo.rewards",
})  # fmt: skip
_FIELD = "it is a field: args=GRPOConfig({}=...)"
# Of GRPOTrainer itself, in a script.
_OF_TRAINER = _by_name({
    "tokenizer processor": "write processing_class",
    "config training_args grpo_config": "write args",
    "dataset train_data": "write train_dataset",
    "eval_data": "write eval_dataset",
    "reward reward_func reward_functions reward_fn reward_model rewards": "write reward_funcs",
    "lora_config": "write peft_config",
    "bnb_config": "write quantization_config",
    "compute_metrics preprocess_logits_for_metrics": "what is measured of completions is a reward's log_metric",
    "data_collator": "rows reach the rewards as they are in the data",
    "model_init": "pass the model itself",
})  # fmt: skip
# In scripts, recipes and flags alike.
_ANYWHERE = _by_name({
    "max_length max_seq_length max_seq_len max_model_len max_sequence_length":
        "write max_prompt_length and max_completion_length, which add up to it",
    "fast_inference use_vllm_colocate vllm_colocate": "write use_vllm with vllm_mode 'colocate'",
    "gamma lam gae_lambda vf_coef cliprange_value value_model critic_learning_rate":
        "GRPO has no value model, so there is nothing to set",
    "ref_model ref_model_name reference_model":
        "the reference is the model without its adapter, or a frozen copy (beta, sync_ref_model)",
    "reward_model_name_or_path": "write it among the reward_funcs: models' names may stand there",
    "do_sample": "completions are always sampled (temperature, top_p, top_k, min_p)",
    "overwrite_output_dir": "drop it: a run goes on only where it is asked to",
    "save_safetensors": "drop it: weights are always saved as safetensors",
    "logging_dir": "drop it, and set the environment variable TENSORBOARD_LOGGING_DIR",
    "num_gpus num_processes n_gpus_per_node tensor_parallel_size device_map":
        "drop it: one process trains on one card",
    "push_to_hub_model_id push_to_hub_organization": "write hub_model_id",
    "push_to_hub_token": "write hub_token",
    "jit_mode_eval": "drop it: transformers has no such setting any more",
    "include_tokens_per_second": "drop it: tokens_per_second is always logged",
})  # fmt: skip
_QUANTIZED = _by_name({"nf4 4bit int4 fp4 4": "load_in_4bit", "int8 8bit 8": "load_in_8bit"})


def check_names(kind: type, given: Mapping[str, Any]) -> None:
    """Whether the constructor of `kind`, GRPOConfig or a class made from it, takes arguments of these names.

    Raises:
        UnknownSetting: it does not; all such names, and what to write instead of each.
    """
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    unknown = {name: value for name, value in given.items() if name not in parameters}
    if not unknown:
        return
    said = [f"{name!r}{_in_a_script(name, value, parameters)}" for name, value in unknown.items()]
    no_fields = f"no field {said[0]}" if len(said) == 1 else f"none of these fields: {'; '.join(said)}"
    raise UnknownSetting(f"{kind.__name__} has {no_fields}.")


def check_trainer_arguments(given: Mapping[str, Any], known: Iterable[str], config_fields: Iterable[str]) -> None:
    """Whether GRPOTrainer may be called with arguments beyond those it has.

    Args:
        given: those arguments.
        known: the names of those it has.
        config_fields: names of GRPOConfig's fields.

    Raises:
        UnknownSetting: it may not; all of their names, and what to write instead of each.
    """
    unknown = list(given)
    if not unknown:
        return
    fields_there = set(config_fields)

    def instead(name: str) -> str:
        advice = _OF_TRAINER.get(name) or _ANYWHERE.get(name)
        if not advice and name in fields_there:
            advice = _FIELD.format(name)
        return f" ({advice})" if advice else did_you_mean(name, known)

    said = [f"{name!r}{instead(name)}" for name in unknown]
    no_such = f"no argument {said[0]}" if len(said) == 1 else f"none of these arguments: {'; '.join(said)}"
    raise UnknownSetting(f"GRPOTrainer has {no_such}.")


class Arguments:
    """A class's `__signature__`: that of the constructor that it or a class made from it has."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        found = inspect.signature(owner.__init__)  # type: ignore[misc]
        return found.replace(parameters=list(found.parameters.values())[1:])


def _in_a_script(name: str, value: Any, known: Iterable[str]) -> str:
    if name == "quantization":
        kind = _QUANTIZED.get(str(value).lower())
        return f" ({_ELSEWHERE[kind] if kind else _TO_TRAINER.format('quantization_config=...')})"
    if advice := _ELSEWHERE.get(name) or _ANYWHERE.get(name):
        return f" ({advice})"
    if ours := _RENAMED.get(name):
        return f" (write {ours})"
    return did_you_mean(name, known)


def instead_of(name: str, known: Iterable[str], *, flag: bool = False) -> str:
    """What a recipe, or with `flag` the command line, has in place of an unknown setting, in brackets to follow it; an
    empty string where nobody knows.

    Args:
        name: with underscores.
        known: all names there are.
    """
    spelled = flag_of if flag else str
    if ours := _RENAMED.get(name):
        return f" (write {spelled(ours)})"
    if advice := _ANYWHERE.get(name):
        return f" ({advice})"
    return did_you_mean(spelled(name), map(spelled, known))
