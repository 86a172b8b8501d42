"""Settings of transformers' TrainingArguments that would fail in the middle of a job, looked at before it begins.

transformers finds out about a wrong optimizer, schedule or logger when the model is loaded. Here the same functions are
called at once, on next to nothing, and what they raise becomes a sentence that names the setting. What takes more than
the settings to know is looked at by `training.early_checks`.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils.logging import get_log_levels_dict

from lowvram_grpo.errors import UserError, did_you_mean, one_line

_CHOICES = {
    "optim": OptimizerNames,
    "lr_scheduler_type": SchedulerType,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
}
_MOST_SHOWN = 12
# Of a run whose length is not known yet.
_STEPS = 1000
# Refused by name, with the reason.
REFUSED_FIELDS = {
    "auto_find_batch_size": "a smaller batch would not hold whole groups; lower per_device_train_batch_size instead",
    "deepspeed": "more than one process is not supported yet; drop it, memory is saved by --preset and the fields of "
    "docs/memory.md",
    "fsdp": "more than one process is not supported yet; drop it",
    "parallelism_config": "more than one process is not supported yet; drop it",
}
_DICTIONARIES = ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "lr_scheduler_kwargs",
                 "gradient_checkpointing_kwargs", "transformers_continuous_batching_config")  # fmt: skip
# Such optimizers step while the backward pass runs, and leave no gradient behind.
STEP_IN_BACKWARD = ("layerwise", "lomo")
_PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# What a schedule cannot do without, or is most often meant to have.
_SCHEDULE_EXAMPLES = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 100},
    "polynomial": {"lr_end": 1e-8},
    "cosine_with_restarts": {"num_cycles": 2},
    "reduce_lr_on_plateau": {"patience": 2},
    "greedy": {"patience": 2},
}
_FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")


def check_choices(args: Any) -> None:
    """Names that have to be of a list, dictionaries that have to be JSON, and what is not supported. Before
    TrainingArguments looks at them.

    Raises:
        UserError: one that is not.
    """
    for name, why in REFUSED_FIELDS.items():
        if getattr(args, name, None):
            raise UserError(f"{name} is set, but {why}.")
    levels = [*get_log_levels_dict(), "passive"]
    named = {name: [choice.value for choice in kind] for name, kind in _CHOICES.items()}
    for name, known in {**named, "log_level": levels, "log_level_replica": levels}.items():
        value = getattr(getattr(args, name), "value", getattr(args, name))
        if value not in known:
            shown = ", ".join(known if len(known) <= _MOST_SHOWN else [*known[:_MOST_SHOWN], "..."])
            raise UserError(f"{name} is {value!r}{did_you_mean(str(value), known)}; choose one of {shown}.")
    if args.bf16 and args.fp16:
        raise UserError("bf16 and fp16 are both set; leave one of them, or neither: the device decides then.")
    _check_evaluated(args)
    for name in _DICTIONARIES:
        value = getattr(args, name, None)
        if value is None or isinstance(value, dict):
            continue
        try:
            parsed = json.loads(value)
        except (TypeError, ValueError):
            parsed = None
        if not isinstance(parsed, dict):
            raise UserError(f"{name} is {value!r}, which is no JSON object; write it as '{{\"name\": value}}'.")


# Not typed as a GRPOConfig: that module asks this one.
def _check_evaluated(args: Any) -> None:
    """What goes by an evaluation, and what loads a checkpoint, must find one.

    Raises:
        UserError: it does not.
    """
    evaluated, saved = value_of(args.eval_strategy), value_of(args.save_strategy)
    for name in ("load_best_model_at_end", "early_stopping"):
        if getattr(args, name) and evaluated == "no":
            raise UserError(
                f"{name} is set, but nothing is evaluated; pass --eval-data or --eval-split (in a script eval_dataset "
                "and eval_strategy), or drop it."
            )
    if not args.load_best_model_at_end or saved == "best":
        return
    if saved == evaluated:
        every, each = args.save_steps, args.eval_steps or args.logging_steps
        if saved == "steps" and min(every, each) >= 1 and every % each:
            raise UserError(
                f"load_best_model_at_end takes the weights of a checkpoint, and save_steps {every:g} is no multiple of "
                f"eval_steps {each:g}; set save_steps to {each:g}."
            )
        return
    raise UserError(
        f"load_best_model_at_end is set with save_strategy {saved} and eval_strategy {evaluated}, so the best model "
        f"would not be kept; set save_strategy to {evaluated} or best, or drop load_best_model_at_end."
    )


def settle_best_model(args: Any) -> None:
    """What is followed where no metric is named: the reward of the evaluation, which transformers would replace by the
    lowest loss, and a GRPO loss says nothing."""
    by_metric = value_of(args.lr_scheduler_type) in _FOLLOW_A_METRIC
    if args.metric_for_best_model is None and (
        args.load_best_model_at_end or args.early_stopping or value_of(args.save_strategy) == "best" or by_metric
    ):
        args.metric_for_best_model = "eval_reward"
    if args.metric_for_best_model is not None and args.greater_is_better is None:
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")
    if by_metric and args.greater_is_better:
        # Such a schedule lowers the rate while its metric rises, unless it is told which way is up.
        given = args.lr_scheduler_kwargs or {}
        args.lr_scheduler_kwargs = {"mode": "max", **(json.loads(given) if isinstance(given, str) else given)}


def check_built(args: TrainingArguments) -> None:
    """Build the optimizer and the schedule for one weight, and look for the loggers.

    Raises:
        UserError: one of them can't be had.
    """
    _check_optimizer(args)
    _check_schedule(args)
    if value_of(args.save_strategy) == "best" and value_of(args.eval_strategy) == "no":
        raise UserError(
            "save_strategy is best, but nothing is evaluated, so nothing would be saved; set eval_strategy."
        )
    if not args.report_to:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    available = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise UserError(
                f"report_to is {name!r}{did_you_mean(str(name), known)}; choose one of none, all, {', '.join(known)}."
            )
        if name not in available and name != "kubeflow":
            raise UserError(f"report_to asks for {name}, which is not installed; `pip install {name}`, or drop it.")


def _check_optimizer(args: TrainingArguments) -> None:
    optim = value_of(args.optim)
    if any(part in optim for part in STEP_IN_BACKWARD):
        raise UserError(
            f"optim {optim} steps while the backward pass runs, and a step here is made of several of them; take "
            "adamw_8bit, or adamw_torch with optimizer_offload."
        )
    if optim in _PLAIN_OPTIMIZERS and not args.optim_args:
        return
    from transformers import Trainer

    alone = copy.copy(args)
    alone.gradient_accumulation_steps = 1
    model = nn.Sequential(nn.Linear(2, 2))
    if args.optim_target_modules is not None:
        alone.optim_target_modules = "all-linear"  # whether the names fit is for the model to say
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(alone, model)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            kind(**{"params": list(model.parameters()), **kwargs})
    except Exception as error:  # other packages' own, with errors of their own
        arguments = args.optim_args and isinstance(error, (ValueError, TypeError))
        raise optimizer_error(optim, error, "check optim_args" if arguments else None) from error


def optimizer_error(optim: str, error: Exception, remedy: str | None = None) -> UserError:
    """One sentence for an optimizer that can't be made."""
    return UserError(
        f"optim {optim} can't be used ({one_line(error)}); "
        f"{remedy or 'see to that, or take adamw_torch or adamw_8bit'}."
    )


def _check_schedule(args: TrainingArguments) -> None:
    name = value_of(args.lr_scheduler_type)
    if name == "linear" and not args.lr_scheduler_kwargs:
        return
    from transformers import get_scheduler

    weight = nn.Parameter(torch.zeros(1))
    try:
        optimizer = torch.optim.SGD([weight], lr=args.learning_rate)
        warmup = args.get_warmup_steps(_STEPS)
        horizon = args.max_steps if args.max_steps > 0 else warmup + _STEPS
        schedule = get_scheduler(name, optimizer, warmup, horizon, dict(args.lr_scheduler_kwargs or {}))
        for _ in range(0 if name in _FOLLOW_A_METRIC else 10):
            optimizer.step()
            schedule.step()
    except (ValueError, TypeError, ArithmeticError) as error:
        example = f", as in --lr-scheduler-kwargs '{json.dumps(_SCHEDULE_EXAMPLES[name])}'" \
            if name in _SCHEDULE_EXAMPLES else ""  # fmt: skip
        raise UserError(
            f"lr_scheduler_type {name} can't be set up ({one_line(error)}); set lr_scheduler_kwargs to what it "
            f"takes{example}."
        ) from error


def value_of(choice: Any) -> str:
    """The text of a setting that transformers turns into an enum."""
    return str(getattr(choice, "value", choice))
