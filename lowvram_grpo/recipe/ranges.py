"""Which numbers a setting may take: one table, looked at before anything is loaded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lowvram_grpo.errors import UserError


@dataclass(frozen=True)
class Range:
    """The finite numbers between two bounds. `also` is one more value that is fine, with what it means in brackets;
    `because` says why the bound is where it is, in a sentence that ends the error's."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: tuple[float, str] | None = None
    because: str = ""

    def __contains__(self, value: float) -> bool:
        if self.also is not None and value == self.also[0]:
            return True
        # A comparison with NaN is false, so that it fails here too.
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        text = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        return (text or "a finite number") + (f", or {self.also[0]} ({self.also[1]})" if self.also else "")


_ANY = Range()
_COUNT = Range(at_least=1)
_NOT_NEGATIVE = Range(at_least=0)
_POSITIVE = Range(above=0)
_SHARE = Range(at_least=0, at_most=1)

LORA_RANGES: dict[str, Range] = {
    "lora_r": _COUNT,
    "lora_alpha": _POSITIVE,
    "lora_dropout": Range(at_least=0, below=1),
}

# Parameters of built-in rewards, `rewards.settings.RewardSettings`.
REWARD_RANGES: dict[str, Range] = {
    "cosine_min_value_wrong": _ANY,
    "cosine_max_value_wrong": _ANY,
    "cosine_min_value_correct": _ANY,
    "cosine_max_value_correct": _ANY,
    "cosine_max_len": _COUNT,
    "repetition_n_grams": _COUNT,
    "repetition_max_penalty": Range(at_most=0, because="it is a penalty"),
    "parallel_code_exec_per_proc": _COUNT,
    "code_timeout": _POSITIVE,
    "code_memory_mib": Range(at_least=64, because="Python itself takes about that much"),
    "max_completion_len": _NOT_NEGATIVE,
    "soft_punish_cache": _NOT_NEGATIVE,
}

# Fields of GRPOConfig, those of TrainingArguments too: transformers takes any number and fails in the middle of a run.
TRAINING_RANGES: dict[str, Range] = {
    "num_generations": Range(at_least=2, because="GRPO compares the completions of one prompt with each other"),
    "num_generations_eval": _COUNT,
    "prompts_per_step": _COUNT,
    "resample_dead_groups": _NOT_NEGATIVE,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "generation_batch_size": _COUNT,
    "steps_per_generation": _COUNT,
    "rollout_batch_size": _COUNT,
    "max_prompt_length": _COUNT,
    "max_completion_length": _COUNT,
    "temperature": Range(above=0, because="at 0 all completions of a group are the same, and nothing is learned"),
    "top_p": Range(above=0, at_most=1),
    "top_k": _NOT_NEGATIVE,
    "min_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "vllm_server_port": Range(at_least=1, at_most=65535),
    "vllm_server_timeout": _POSITIVE,
    "vllm_gpu_memory_utilization": Range(above=0, at_most=1),
    "vllm_max_model_length": _COUNT,
    "vllm_max_model_len": _COUNT,
    "vllm_importance_sampling_cap": _POSITIVE,
    "vllm_importance_sampling_clip_max": _POSITIVE,
    "vllm_importance_sampling_clip_min": _NOT_NEGATIVE,
    "beta": _NOT_NEGATIVE,
    "num_iterations": _COUNT,
    "epsilon": _NOT_NEGATIVE,
    "epsilon_high": _NOT_NEGATIVE,
    "delta": _POSITIVE,
    "sapo_temperature_neg": _POSITIVE,
    "sapo_temperature_pos": _POSITIVE,
    "vespo_k_pos": _NOT_NEGATIVE,
    "vespo_lambda_pos": _NOT_NEGATIVE,
    "vespo_k_neg": _NOT_NEGATIVE,
    "vespo_lambda_neg": _NOT_NEGATIVE,
    "off_policy_mask_threshold": _ANY,
    "top_entropy_quantile": Range(above=0, at_most=1),
    "entropy_coef": _NOT_NEGATIVE,
    "entropy_coef_min": _NOT_NEGATIVE,
    "entropy_coef_max": _NOT_NEGATIVE,
    "entropy_coef_delta": _NOT_NEGATIVE,
    "entropy_target": _ANY,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    "max_tool_calling_iterations": _COUNT,
    "pad_to_multiple_of": _COUNT,
    "reward_weights": _ANY,
    "reward_timeout": _POSITIVE,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": _COUNT,
    "workspace_mib": _COUNT,
    "vram_gib": _POSITIVE,
    "mlp_tile": _COUNT,
    "cold_start_learning_rate": _POSITIVE,
    "cold_start_max_steps": _COUNT,
    "learning_rate": _NOT_NEGATIVE,
    "max_steps": Range(at_least=1, also=(-1, "as many as num_train_epochs takes")),
    "num_train_epochs": _POSITIVE,
    "warmup_ratio": _SHARE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "adam_beta1": Range(at_least=0, below=1),
    "adam_beta2": Range(at_least=0, below=1),
    "adam_epsilon": _NOT_NEGATIVE,
    "logging_steps": _NOT_NEGATIVE,
    "save_steps": _NOT_NEGATIVE,
    "eval_steps": _NOT_NEGATIVE,
    "early_stopping": _NOT_NEGATIVE,
    "early_stopping_threshold": _NOT_NEGATIVE,
    "num_completions_to_print": _COUNT,
    "seed": Range(at_least=0, at_most=2**32 - 1, because="NumPy takes no other"),
}


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Hold every value that is set, and each entry of a list, against its range.

    Raises:
        UserError: a value outside, with the range.
    """
    for name, allowed in ranges.items():
        value = values.get(name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is None:
                continue
            try:
                fits = number in allowed
            except TypeError as error:
                wanted = str(allowed) if allowed == _ANY else f"a number, {allowed}"
                raise UserError(f"{name} is {value!r}; it must be {wanted}.") from error
            if not fits:
                reason = f": {allowed.because}" if allowed.because else ""
                if isinstance(number, float) and not math.isfinite(number) and allowed != _ANY:
                    reason = ", and finite"
                raise UserError(f"{name} is {value}; it must be {allowed}{reason}.")


def check_numbers(args: Any) -> None:
    """Whether each field of a dataclass that has to be a number is one: None would go where its default has been.

    Raises:
        UserError: one is None.
    """
    # Not of the fields: transformers' HfArgumentParser takes the None out of their types.
    hints = {
        name: hint for kind in reversed(type(args).__mro__) for name, hint in inspect.get_annotations(kind).items()
    }
    for each in fields(args):
        if hints[each.name] in ("int", "float", int, float) and getattr(args, each.name, 0) is None:
            raise UserError(f"{each.name} is None, but it has to be a number; leave it out for {each.default}.")


def settled_padding(multiple: int | str | None) -> int | None:
    """`pad_to_multiple_of` as TRL settles it on every device but one: "auto" is no multiple.

    Raises:
        UserError: it is neither a number, "auto" nor None.
    """
    if multiple is None or str(multiple).lower() in ("auto", "none", "null"):
        return None
    if isinstance(multiple, bool) or not str(multiple).isdigit():
        raise UserError(f"pad_to_multiple_of is {multiple!r}; it must be a whole number, auto or None.")
    return int(multiple)
