"""GRPOTrainer as a TRL user calls it, on a model small enough for seconds."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Quiet, digit_share, make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from lowvram_grpo import GRPOTrainer, UserError

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_for(model, config, dataset, tokenizer, reward=digit_share, **kwargs):
    return GRPOTrainer(model, reward, config, dataset, processing_class=tokenizer, observer=Quiet(), **kwargs)


def adapter(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "all-weights"])
def test_reward_climbs(config, dataset, tokenizer, model, peft_config):
    args = config(max_steps=25, num_generations=8, learning_rate=2e-2 if peft_config else 3e-3, beta=0.01)
    trainer = trainer_for(model, args, dataset, tokenizer, peft_config=peft_config)
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "loss" in row]
    assert len(rewards) == 25
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


def test_metrics_have_trl_names_and_start_at_the_reference(config, dataset, tokenizer, model):
    trainer = trainer_for(model, config(), dataset, tokenizer, peft_config=LORA)
    trainer.train()
    first, second, *_ = trainer.state.log_history
    for name in [
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "step_time",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "completions/mean_terminated_length",
        "completions/min_terminated_length",
        "completions/max_terminated_length",
        "rewards/digit_share/mean",
        "rewards/digit_share/std",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "kl",
        "clip_ratio/low_mean",
        "clip_ratio/low_min",
        "clip_ratio/high_mean",
        "clip_ratio/high_max",
        "clip_ratio/region_mean",
        "sampling/sampling_logp_difference/mean",
        "sampling/importance_sampling_ratio/mean",
    ]:
        assert name in first, name
    assert first["kl"] == 0 and first["clip_ratio/region_mean"] == 0
    assert first["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert second["kl"] > 0 and second["num_tokens"] > first["num_tokens"]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "all-weights"])
def test_micro_batches_do_not_change_the_step(config, dataset, tokenizer, loss_type, peft_config):
    """1 x 8 equals 8 x 1 equals 3 + 3 + 2."""
    after = []
    for rows in (8, 1, 3):
        args = config(
            per_device_train_batch_size=rows, loss_type=loss_type, max_steps=1, optim="sgd", learning_rate=0.5
        )
        trainer = trainer_for(make_model(), args, dataset, tokenizer, peft_config=peft_config)
        trainer.train()
        after.append((adapter(trainer), trainer.state.log_history[0]["loss"]))
    for weights, loss in after[1:]:
        assert loss == pytest.approx(after[0][1], abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(value, after[0][0][name], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(config, dataset, tokenizer):
    runs = []
    for checkpointing in (False, True):
        args = config(gradient_checkpointing=checkpointing)
        trainer = trainer_for(make_model(), args, dataset, tokenizer, peft_config=LORA)
        trainer.train()
        runs.append(adapter(trainer))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name])


def test_trl_batch_sizes_are_honoured(config, dataset, tokenizer, model):
    args = config(prompts_per_step=None, per_device_train_batch_size=2, gradient_accumulation_steps=6)
    trainer = trainer_for(model, args, dataset, tokenizer, peft_config=LORA)
    assert (trainer.plan.prompts_per_rollout, trainer.plan.micro_batch_size) == (3, 2)
    odd = config(prompts_per_step=None, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    assert odd.batch_plan().completions_per_rollout == 4
    assert any("do not make whole groups" in n for n in odd.notices())


def test_rollouts_serve_several_updates_and_iterations(config, dataset, tokenizer, model):
    """Two slices, two passes: the first pass over the first slice is on-policy, everything later is not."""
    prompts_seen = []

    def spy(prompts, completions, **kwargs):
        prompts_seen.append(prompts)
        return digit_share(completions)

    args = config(
        prompts_per_step=None, per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=2,
        num_iterations=2, max_steps=8,
    )  # fmt: skip
    assert args.batch_plan().steps_per_rollout == 4
    trainer = trainer_for(model, args, dataset, tokenizer, reward=spy, peft_config=LORA)
    trainer.train()
    assert len(prompts_seen) == 2 and all(len(p) == 8 for p in prompts_seen)
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 8


def test_old_logps_make_the_first_ratio_exactly_one(config, dataset, tokenizer, model):
    """With several updates a rollout, old log-probs are scored apart; the ratio must still start at exactly 1."""
    args = config(num_iterations=2, per_device_train_batch_size=3)
    trainer = trainer_for(model, args, dataset, tokenizer, peft_config=LORA)
    rollout = trainer.collect([dataset[i] for i in range(2)], 0)
    for micro in trainer._learnable(rollout)[0]:
        trainer.model.train()
        assert torch.equal(trainer.learner.score(micro).logps.detach(), micro.old_per_token_logps)


def test_truncated_completions_can_be_masked_even_if_all_are(config, dataset, tokenizer, model):
    args = config(mask_truncated_completions=True, max_completion_length=1, beta=0.0, max_steps=1)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    trainer = trainer_for(model, args, dataset, tokenizer, peft_config=LORA)
    before = adapter(trainer)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["completions/clipped_ratio"] == 1 and row["loss"] == 0
    assert all(torch.equal(v, before[n]) for n, v in adapter(trainer).items())


def test_rewards_that_never_apply_leave_only_the_kl(config, dataset, tokenizer, model):
    trainer = trainer_for(
        model,
        config(max_steps=1),
        dataset,
        tokenizer,
        reward=lambda completions, **k: [None] * len(completions),
        peft_config=LORA,
    )
    trainer.train()
    row = trainer.state.log_history[0]
    assert math.isnan(row["reward"]) and row["frac_reward_zero_std"] == 1 and row["loss"] == 0


def test_evaluation_callbacks_and_saving(config, dataset, tokenizer, model, tmp_path):
    class Count(TrainerCallback):
        steps = evaluations = 0

        def on_step_end(self, *args, **kwargs):
            Count.steps += 1

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            Count.evaluations += 1
            assert "eval_reward" in metrics

    args = config(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    trainer = trainer_for(model, args, dataset, tokenizer, peft_config=LORA, eval_dataset=dataset, callbacks=[Count()])
    trainer.train()
    assert (Count.steps, Count.evaluations) == (2, 2)
    assert sum("eval_rewards/digit_share/mean" in row for row in trainer.state.log_history) == 2
    trainer.model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_trained_adapter_becomes_its_own_frozen_reference(config, dataset, tokenizer, model):
    wrapped = get_peft_model(model, LORA)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    trainer = trainer_for(wrapped, config(), dataset, tokenizer)
    assert trainer.reference.kind == "frozen adapter"
    start = {n: p.detach().clone() for n, p in wrapped.named_parameters() if ".reference." in n}
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0 and trainer.state.log_history[1]["kl"] > 0
    for name, p in wrapped.named_parameters():
        if ".reference." in name:
            assert not p.requires_grad and torch.equal(p, start[name])
            assert not torch.equal(p, wrapped.get_parameter(name.replace(".reference.", ".default.")))


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "all-weights"])
def test_the_reference_follows_when_asked(config, dataset, tokenizer, model, peft_config):
    args = config(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, max_steps=3)
    trainer = trainer_for(model, args, dataset, tokenizer, peft_config=peft_config)
    trainer.train()
    assert [row["kl"] for row in trainer.state.log_history if "loss" in row] == [0, 0, 0]


def test_refused_by_name(config, dataset, tokenizer, model):
    with pytest.raises(UserError, match="lm_head"):
        trainer_for(model, config(), dataset, tokenizer, peft_config=LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match="columns found: question"):
        trainer_for(make_model(), config(), Dataset.from_dict({"question": ["a"]}), tokenizer)
    with pytest.raises(UserError, match="empty"):
        trainer_for(make_model(), config(), dataset.select([]), tokenizer)
    with pytest.raises(UserError, match="neither a local folder nor reachable"):
        trainer_for("no/such-model", config(), dataset, tokenizer)
    with pytest.raises(UserError, match="128 positions"):
        trainer_for(make_model(), config(max_completion_length=126), dataset, tokenizer, peft_config=LORA).train()


def test_inert_settings_say_so(config, dataset, tokenizer, model):
    args = config(vllm_mode="server", vllm_gpu_memory_utilization=0.5, vllm_dtype="half", max_steps=1)
    trainer = trainer_for(model, args, dataset, tokenizer, peft_config=LORA)
    trainer.train()
    said = " ".join(trainer.observer.said)
    assert "vllm_dtype has no effect: vLLM takes the model's own" in said
    assert "vllm_mode, vllm_gpu_memory_utilization have no effect without use_vllm" in said
    served = " ".join(config(use_vllm=True, vllm_mode="server", vllm_gpu_memory_utilization=0.5).notices())
    assert "vllm_gpu_memory_utilization has no effect with vllm_mode server" in served and "vllm_mode," not in served


def test_long_prompts_lose_their_left_end_and_it_is_said(config, tokenizer, model):
    data = Dataset.from_dict({"prompt": ["a b c d e f", "a b"]})
    trainer = trainer_for(model, config(max_prompt_length=3, max_steps=1), data, tokenizer, peft_config=LORA)
    trainer.train()
    assert any("1 of 2 prompts" in text for text in trainer.observer.said)
    assert tokenizer.convert_ids_to_tokens(trainer.collector.encode(["a b c d e f"])[0]) == ["d", "e", "f"]


def test_self_test_stops_a_model_that_does_not_score_what_it_samples(config, dataset, tokenizer, model, monkeypatch):
    import lowvram_grpo.training.scoring as scoring

    monkeypatch.setattr(scoring, "position_ids", lambda mask: torch.arange(mask.shape[1]).expand_as(mask).flip(1))
    trainer = trainer_for(model, config(shared_prefix="off"), dataset, tokenizer, peft_config=LORA)
    with pytest.raises(UserError, match="Self-test failed"):
        trainer.train()


def test_conversations_reach_the_rewards_as_messages(config, model):
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a b"}]] * 4, "answer": list("1234")})
    seen = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
        seen.update(
            prompt=prompts[0],
            completion=completions[0],
            ids=completion_ids[0],
            answer=answer,
            step=trainer_state.global_step,
        )
        return [0.0] * len(completions)

    trainer_for(model, config(max_steps=1), data, make_tokenizer(chat=True), reward=reward, peft_config=LORA).train()
    assert seen["prompt"][0]["role"] == "user" and seen["completion"][0]["role"] == "assistant"
    assert isinstance(seen["ids"][0], int) and len(seen["answer"]) == 8 and seen["step"] == 0


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "all-weights"])
def test_autocast_reaches_sampler_and_scorer_alike(config, dataset, tokenizer, model, peft_config):
    dtypes = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, out: dtypes.add(out.dtype))
    trainer = trainer_for(model, config(bf16=True), dataset, tokenizer, peft_config=peft_config)
    trainer.train()
    assert dtypes == {torch.bfloat16}
    for row in trainer.state.log_history[:2]:
        assert row["sampling/sampling_logp_difference/mean"] < 0.1
    assert trainer.state.log_history[0]["kl"] == 0


def test_train_can_be_called_again(config, dataset, tokenizer, model):
    trainer = trainer_for(model, config(), dataset, tokenizer, peft_config=LORA)
    trainer.train()
    trainer.train()
    assert sum("self-test" in text for text in trainer.observer.said) == 1


def test_several_evaluation_datasets_keep_their_names(config, dataset, tokenizer, model):
    args = config(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8)
    trainer = trainer_for(model, args, dataset, tokenizer, peft_config=LORA, eval_dataset={"a": dataset, "b": dataset})
    trainer.train()
    rewards = {k: v for row in trainer.state.log_history for k, v in row.items() if k.endswith("_reward")}
    assert rewards.keys() == {"eval_a_reward", "eval_b_reward"}
    assert rewards["eval_a_reward"] == rewards["eval_b_reward"]  # same data, same weights, same seeds


def test_a_frozen_model_is_named(config, dataset, tokenizer, model):
    with pytest.raises(UserError, match="is_trainable=True"):
        trainer_for(model.requires_grad_(False), config(), dataset, tokenizer)


def test_float16_weights_are_trained_in_float32(config, dataset, tokenizer, model):
    trainer = trainer_for(model.half(), config(max_steps=1), dataset, tokenizer)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("where", ["generate", "score"])
def test_out_of_memory_names_its_phase(config, dataset, tokenizer, model, monkeypatch, where):
    import lowvram_grpo.training.learner as module

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    trainer = trainer_for(model, config(self_test=False), dataset, tokenizer, peft_config=LORA)
    if where == "generate":
        monkeypatch.setattr(trainer.collector.engine, "generate", full)
    else:
        monkeypatch.setattr(module, "score", full)
    with pytest.raises(UserError, match=r"Out of GPU memory in the .* phase \(tried to allocate 2.00 GiB\)"):
        trainer.train()


def test_transformers_argument_parser_reads_the_config(tmp_path):
    """Scripts in TRL's style parse their command line with it."""
    from transformers import HfArgumentParser

    from lowvram_grpo import GRPOConfig

    line = f"--output_dir {tmp_path} --use_cpu --scale_rewards false --cold_start 5 --reward_weights 1 0.5 --beta 0"
    (args,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(line.split())
    assert (args.scale_rewards, args.cold_start, args.reward_weights, args.beta) == ("none", 5, [1.0, 0.5], 0.0)


def test_settings_without_effect_are_all_said(config):
    said = " ".join(
        config(
            num_completions_to_print=3,
            dataloader_persistent_workers=True,
            kl_estimator="k1",
            use_bias_correction_kl=False,
        ).notices()
    )
    for name in ("num_completions_to_print", "dataloader_persistent_workers", "kl_estimator k1"):
        assert name in said
    with pytest.raises(UserError, match="auto_find_batch_size"):
        config(auto_find_batch_size=True)


def test_datasets_are_looked_at_before_anything_is_loaded(config, dataset):
    from datasets import DatasetDict

    with pytest.raises(UserError, match="`eval_dataset` must be a `Dataset` or `IterableDataset`, and is a generator"):
        GRPOTrainer("no/such-model", digit_share, config(), dataset, (row for row in dataset))
    with pytest.raises(
        UserError, match=r"`train_dataset` must be .*is a DatasetDict of several datasets \(train, test\)"
    ):
        GRPOTrainer("no/such-model", digit_share, config(), DatasetDict(train=dataset, test=dataset))
    with pytest.raises(UserError, match=r"eval_dataset\['test'\] is empty"):
        GRPOTrainer(
            "no/such-model", digit_share, config(), dataset, DatasetDict(train=dataset, test=dataset.select([]))
        )
