"""Settings of transformers that used to end in a traceback, half of them after the model was loaded."""

from __future__ import annotations

import pytest
from conftest import Quiet, digit_share
from peft import LoraConfig

from lowvram_grpo import GRPOConfig, GRPOTrainer, UserError

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_for(model, args, data, tokenizer, evaluated=None, reward=digit_share, **kwargs):
    return GRPOTrainer(model, reward, args, data, evaluated, tokenizer, peft_config=LORA, observer=Quiet(), **kwargs)


def said_by(call, *arguments, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*arguments, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ["cosine_with_min_lr", "min_lr_rate", "--lr-scheduler-kwargs"]),
        ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, ["lr_scheduler_kwargs"]),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ["num_decay_steps"]),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, ["cosine", "cycles"]),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, ["polynomial", "lr_end"]),
        ({"lr_scheduler_type": "cosin"}, ["lr_scheduler_type is 'cosin'", "did you mean 'cosine'"]),
        ({"lr_scheduler_kwargs": "min_lr_rate=0.1"}, ["lr_scheduler_kwargs", "JSON"]),
        ({"generation_kwargs": "{top_h: 1}"}, ["generation_kwargs", "JSON"]),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ["reduce_lr_on_plateau"]),
        ({"optim": "galore_adamw"}, ["optim galore_adamw", "galore_torch"]),
        ({"optim": "apollo_adamw"}, ["optim apollo_adamw", "apollo_torch"]),
        ({"optim": "grokadamw"}, ["optim grokadamw"]),
        ({"optim": "stable_adamw"}, ["optim stable_adamw", "torch-optimi"]),
        ({"optim": "schedule_free_adamw"}, ["optim schedule_free_adamw", "schedulefree"]),
        ({"optim": "adamw_torch_4bit"}, ["optim adamw_torch_4bit", "torchao"]),
        ({"optim": "adamw_torch_xla"}, ["optim adamw_torch_xla"]),
        ({"optim": "lomo"}, ["optim lomo steps while the backward pass runs"]),
        ({"optim": "galore_adamw_8bit_layerwise"}, ["steps while the backward pass runs"]),
        ({"optim": "adamw8bit"}, ["optim is 'adamw8bit'", "did you mean 'adamw_8bit'"]),
        ({"optim": "sgd", "optim_args": "momentum"}, ["optim sgd", "optim_args"]),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, ["optim sgd", "optim_args"]),
        ({"deepspeed": "x.json"}, ["deepspeed is set"]),
        ({"fsdp": "full_shard"}, ["fsdp is set"]),
        ({"report_to": "wandbb"}, ["report_to is 'wandbb'", "did you mean 'wandb'"]),
        ({"report_to": ["clearml"]}, ["clearml, which is not installed", "pip install clearml"]),
        ({"save_strategy": "epochs"}, ["save_strategy is 'epochs'", "did you mean 'epoch'"]),
        ({"log_level": "loud"}, ["log_level is 'loud'", "warning"]),
        ({"save_strategy": "best"}, ["save_strategy is best", "set eval_strategy"]),
        ({"hub_strategy": "always"}, ["hub_strategy is 'always'", "every_save"]),
        ({"accelerator_config": "none.json"}, ["none.json"]),
        ({"fp16": True, "bf16": True}, ["bf16 and fp16"]),
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, ["load_best_model_at_end"]),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 30},
            ["save_steps 500 is no multiple", "set save_steps to 30"],
        ),
        ({"dataloader_prefetch_factor": 2}, ["dataloader_prefetch_factor"]),
        ({"torch_empty_cache_steps": 0}, ["torch_empty_cache_steps"]),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_one_sentence_before_anything_is_loaded(config, settings, words):
    text = said_by(config, **settings)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-8}'},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_ratio": 0.1},
        {"lr_scheduler_type": "polynomial"},
    ],
    ids=str,
)
def test_what_can_be_built_is_taken(config, settings):
    assert config(**settings).lr_scheduler_type == settings["lr_scheduler_type"]


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "optim": "adafactor"},
        {"torch_compile": True, "ddp_backend": "gloo", "optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
    ],
    ids=str,
)
def test_what_is_taken_trains(config, dataset, tokenizer, model, settings):
    trainer = trainer_for(model, config(**settings), dataset, tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    "settings,metric,greater",
    [
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, "eval_reward", True),
        ({"save_strategy": "best"}, "eval_reward", True),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "eval_reward", True),
        ({"load_best_model_at_end": True, "save_strategy": "best", "metric_for_best_model": "loss"}, "loss", False),
        ({"metric_for_best_model": "rewards/digit_share/mean"}, "rewards/digit_share/mean", True),
        ({"metric_for_best_model": "eval_kl", "greater_is_better": False}, "eval_kl", False),
        ({}, None, None),
    ],
)
def test_the_best_model_is_the_one_with_the_highest_reward(config, settings, metric, greater):
    args = config(eval_strategy="steps", eval_steps=1, save_steps=1, **settings)
    assert (args.metric_for_best_model, args.greater_is_better) == (metric, greater)


@pytest.mark.parametrize("warmup", [5, 10, 1000, 2000])
def test_a_schedule_is_tried_over_the_steps_of_the_run(config, warmup):
    """A decay of no length is a division by zero, where it is the run's."""
    for steps in (warmup + 10, -1):
        config(lr_scheduler_type="polynomial", warmup_steps=warmup, max_steps=steps)


def test_a_plateau_knows_which_way_is_up(config):
    plateau = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}
    assert config(**plateau).lr_scheduler_kwargs == {"mode": "max"}
    assert config(**plateau, metric_for_best_model="loss").lr_scheduler_kwargs is None
    assert config(**plateau, lr_scheduler_kwargs='{"patience": 2}').lr_scheduler_kwargs == {
        "mode": "max",
        "patience": 2,
    }
    assert config(**plateau, lr_scheduler_kwargs={"mode": "min"}).lr_scheduler_kwargs == {"mode": "min"}


def test_settings_that_would_change_what_is_compared_have_no_effect(config, tmp_path):
    said = " ".join(config(neftune_noise_alpha=5.0, label_smoothing_factor=0.1, fsdp_config={}).notices())
    assert "neftune_noise_alpha has no effect" in said and "label_smoothing_factor has no effect" in said
    assert "lr_scheduler_kwargs" in GRPOConfig.__dataclass_fields__
