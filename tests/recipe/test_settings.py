"""Settings of transformers that used to end in a traceback, half of them after the model was loaded."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
from conftest import Quiet, digit_share
from peft import LoraConfig

from lowvram_grpo import GRPOConfig, GRPOTrainer, UserError
from lowvram_grpo.recipe.settings import check_best_metric
from lowvram_grpo.training.pushing import check_hub

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


def test_a_metric_that_a_reward_asks_to_log_may_come_later(config, dataset, tokenizer, model):
    def late(completions, log_metric, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            log_metric("hard", 1.0)
        return [len(set(completion)) / 8 for completion in completions]

    calls = []
    args = config(metric_for_best_model="hard", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
                  save_strategy="steps", save_steps=2, num_generations_eval=2)  # fmt: skip
    trainer = trainer_for(model, args, dataset, tokenizer, dataset.select(range(2)), late)
    trainer.train()
    assert trainer.state.best_metric == 1.0


def test_a_plateau_knows_which_way_is_up(config):
    plateau = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}
    assert config(**plateau).lr_scheduler_kwargs == {"mode": "max"}
    assert config(**plateau, metric_for_best_model="loss").lr_scheduler_kwargs is None
    assert config(**plateau, lr_scheduler_kwargs='{"patience": 2}').lr_scheduler_kwargs == {
        "mode": "max",
        "patience": 2,
    }
    assert config(**plateau, lr_scheduler_kwargs={"mode": "min"}).lr_scheduler_kwargs == {"mode": "min"}


def test_the_best_model_is_loaded_at_the_end(config, dataset, tokenizer, model):
    """Rewards that fall with every evaluation: the first checkpoint wins, whatever the losses are."""
    calls = []

    def falling(completions, trainer_state, **kwargs):
        calls.append(trainer_state.global_step)
        return [digit - trainer_state.global_step for digit in digit_share(completions)]

    args = config(max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                  load_best_model_at_end=True, per_device_eval_batch_size=48, learning_rate=0.05)  # fmt: skip
    # Saved as the difference from what it took out of the base: its own factors are the first half.
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa")
    trainer = GRPOTrainer(model, falling, args, dataset, dataset, tokenizer, peft_config=lora, observer=Quiet())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    from safetensors.torch import load_file

    saved = load_file(f"{args.output_dir}/checkpoint-1/adapter_model.safetensors")
    now = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if ".default." in n}
    assert saved and saved.keys() == now.keys()
    for name, p in now.items():
        assert torch.equal(p.detach(), saved[name][: p.shape[0], : p.shape[1]])


def test_a_metric_that_will_not_be_there_is_refused_before_training(config, dataset, tokenizer, model):
    args = config(eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_acc")
    plain = lambda completions: [0.0] * len(completions)
    # Nothing but the texts goes into this one, so that it logs nothing, and no model needs to be there.
    text = said_by(trainer_for, "no/such-model", args, dataset, tokenizer, dataset, plain)
    assert "'eval_acc'" in text and "eval_reward" in text and "eval_rewards/<lambda>/mean" in text
    # This one could log it, and has not once it was called.
    trainer = trainer_for(model, args, dataset, tokenizer, dataset)
    assert "'eval_acc'" in said_by(trainer.train) and trainer.state.global_step == 0


def test_a_metric_that_a_reward_logs_can_choose(config, dataset, tokenizer, model):
    def reward(completions, log_metric, **kwargs):
        log_metric("acc", 0.5)
        return digit_share(completions)

    args = config(eval_strategy="steps", eval_steps=1, metric_for_best_model="acc", per_device_eval_batch_size=48)
    trainer = trainer_for(model, args, dataset, tokenizer, dataset, reward)
    trainer.train()
    assert trainer.state.best_metric == 0.5


def test_several_evaluation_datasets_need_a_choice(config, dataset, tokenizer, model):
    args = config(eval_strategy="steps", eval_steps=2, save_strategy="best", per_device_eval_batch_size=48)
    both = {"a": dataset, "b": dataset}
    reward = lambda completions: digit_share(completions)
    text = said_by(trainer_for, model, args, dataset, tokenizer, both, reward)
    assert "several" in text and "eval_a_reward" in text and "eval_b_reward" in text
    args.metric_for_best_model = "b_reward"
    trainer = trainer_for(model, args, dataset, tokenizer, both)
    trainer.train()
    assert trainer.state.best_metric is not None


def test_the_known_metrics_are_those_of_an_evaluation(config, dataset, tokenizer, model):
    args = config(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=48)
    trainer = trainer_for(model, args, dataset, tokenizer, dataset)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "eval_reward" in row)
    for name in row.keys() - {"epoch", "step"}:
        args.metric_for_best_model = name
        check_best_metric(args, ["digit_share"], dataset, (), final=True)


def test_an_evaluation_needs_data_that_can_be_used(config, dataset, tokenizer):
    assert "eval_on_start" in said_by(trainer_for, "no/model", config(eval_on_start=True), dataset, tokenizer)
    args = config(eval_strategy="steps", eval_steps=1)
    assert "no eval_dataset" in said_by(trainer_for, "no/model", args, dataset, tokenizer)
    assert "no length" in said_by(trainer_for, "no/model", args, dataset, tokenizer, dataset.to_iterable_dataset())


def test_the_hub_is_asked_before_training(config, monkeypatch):
    args = config(push_to_hub=True, hub_token=None)
    assert "HF_HUB_OFFLINE" in said_by(check_hub, args)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "hf auth login" in said_by(check_hub, args)
    args.hub_token = "hf_x"

    def unreachable(self, token=None):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", unreachable)
    assert "no route to host" in said_by(check_hub, args)
    args.hub_model_id = "a/b/c"
    assert "hub_model_id is 'a/b/c'" in said_by(check_hub, args)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self, token=None: {})
    args.hub_model_id = "me/policy"
    check_hub(args)


def test_a_push_that_fails_loses_no_training(config, dataset, tokenizer, model, monkeypatch):
    args = config(max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True)
    monkeypatch.setattr("lowvram_grpo.recipe.settings.check_hub", lambda args: None)
    with pytest.raises(UserError, match="can't make the repository"):
        trainer_for(model, args, dataset, tokenizer)
    monkeypatch.setattr(GRPOTrainer, "init_hf_repo", lambda self: setattr(self, "push_in_progress", None))
    trainer = trainer_for(model, args, dataset, tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2 and any("nothing was pushed" in text for text in trainer.observer.said)


def test_settings_that_would_change_what_is_compared_have_no_effect(config, tmp_path):
    said = " ".join(config(neftune_noise_alpha=5.0, label_smoothing_factor=0.1, fsdp_config={}).notices())
    assert "neftune_noise_alpha has no effect" in said and "label_smoothing_factor has no effect" in said
    assert "lr_scheduler_kwargs" in GRPOConfig.__dataclass_fields__
