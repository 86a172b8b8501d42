"""What is looked at before a model is loaded, and takes more than the settings to know."""

from __future__ import annotations

import huggingface_hub
import torch
from conftest import Quiet, digit_share
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.training.early_checks import check_best_metric
from lowvram_grpo.training.pushing import check_hub
from tests.recipe.test_settings import said_by, trainer_for


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
    nothing = dataset.to_iterable_dataset().take(0)
    assert "eval_dataset is empty" in said_by(trainer_for, "no/model", args, dataset, tokenizer, nothing)


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
