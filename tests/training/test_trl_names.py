"""What scripts and callbacks that were written for TRL read off a trainer, and what they are told and refused."""

from __future__ import annotations

import logging
import math
import os

import pytest
import torch
from conftest import Quiet, digit_share, make_model, make_tokenizer
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from torch.utils.data import Sampler, SequentialSampler
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from lowvram_grpo.errors import UserError
from lowvram_grpo.training.trainer import GRPOTrainer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def by_length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def judge() -> LlamaForSequenceClassification:
    """A reward model of the tiny tokenizer."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=41, num_labels=1, pad_token_id=0, **sizes))


def trainer_for(config, dataset, tokenizer, reward=digit_share, model=None, kind=GRPOTrainer, **kwargs):
    model = make_model() if model is None else model
    kwargs = {"processing_class": tokenizer, "observer": Quiet(), **kwargs}
    return kind(model, reward, config, dataset, **kwargs)


def test_settings_are_read_off_the_configuration_and_cannot_be_set_here(config, dataset, tokenizer):
    args = config(beta=0.1, epsilon=0.3, epsilon_high=0.4, top_p=0.9, num_iterations=2, temperature=0.7)
    trainer = trainer_for(args, dataset, tokenizer)
    named = [
        "beta",
        "num_generations",
        "num_iterations",
        "temperature",
        "top_p",
        "loss_type",
        "max_completion_length",
        "scale_rewards",
    ]
    assert {name: getattr(trainer, name) for name in named} == {name: getattr(args, name) for name in named}
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.num_generations_eval) == (0.3, 0.4, 4)
    with pytest.raises(AttributeError, match="set beta there"):
        trainer.beta = 0.5
    assert (trainer.beta, trainer._is_vlm, trainer._entropy_bonus_enabled) == (0.1, False, False)
    assert trainer.entropy_coef == 0 and trainer._last_world_entropy == math.inf


def test_rewards_by_name_weight_tokenizer_and_function(config, dataset, tokenizer):
    model, own = judge(), make_tokenizer()
    trainer = trainer_for(
        config(reward_weights=[1.0, 0.5]), dataset, tokenizer, [by_length, model], reward_processing_classes=[None, own]
    )
    assert trainer.reward_func_names == ["by_length", "LlamaForSequenceClassification"]
    assert trainer.reward_funcs == [by_length, model] and trainer.reward_weights.tolist() == [1.0, 0.5]
    assert trainer.reward_processing_classes == [None, own]
    with pytest.raises(ValueError, match=r"\(1\) must match the number of reward functions \(2\)"):
        trainer_for(config(), dataset, tokenizer, [model, model], reward_processing_classes=own)


def test_the_reference_is_a_model_only_where_there_is_a_copy(config, dataset, tokenizer):
    copied = trainer_for(config(beta=0.1), dataset, tokenizer)
    assert copied.ref_model is copied.reference.model and copied.ref_model is not copied.model
    assert trainer_for(config(beta=0.1), dataset, tokenizer, peft_config=LORA).ref_model is None
    assert trainer_for(config(beta=0.0), dataset, tokenizer).ref_model is None


def test_the_load_balancing_loss_is_named_for_a_mixture_of_experts_alone(config, dataset, tokenizer):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 41, "eos_token_id": 1, "pad_token_id": 0}
    mixed = lambda: MixtralForCausalLM(MixtralConfig(router_aux_loss_coef=0.05, **sizes))
    trainer = trainer_for(config(), dataset, tokenizer, model=mixed())
    assert trainer.aux_loss_enabled and trainer.router_aux_loss_coef == 0.05
    assert not trainer_for(config(router_aux_loss_coef=0.0), dataset, tokenizer, model=mixed()).aux_loss_enabled
    dense = trainer_for(config(), dataset, tokenizer)
    assert dense.aux_loss_enabled is False and dense.router_aux_loss_coef == 0


def test_generate_samples_as_rollouts_do_with_the_trainers_configuration(config, dataset, tokenizer):
    trainer = trainer_for(config(temperature=0.7, repetition_penalty=1.2, top_k=3), dataset, tokenizer)
    made = trainer.generation_config
    assert (made.max_new_tokens, made.temperature, made.top_k, made.repetition_penalty) == (6, 0.7, 3, 1.2)
    assert made.eos_token_id == trainer.eos_token_ids == [1]
    ids = tokenizer(["a b"], return_tensors="pt", return_token_type_ids=False)
    out = trainer.model.generate(**ids, generation_config=made)
    assert out.shape[1] <= 2 + 6 and trainer.generation_kwargs["max_new_tokens"] == 6


def test_logs_hold_the_last_rollout_and_what_rewards_logged(config, dataset, tokenizer):
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("first", [completion[:1] for completion in completions])
        log_metric("half", 0.5)
        return digit_share(completions)

    trainer = trainer_for(config(max_steps=2), dataset, tokenizer, [reward, by_length])
    trainer.train()
    logs = trainer._logs
    assert list(logs["rewards"]) == ["reward", "by_length"] and list(logs["extra"]) == ["first"]
    columns = [
        logs["prompt"],
        logs["completion"],
        logs["advantages"],
        *logs["rewards"].values(),
        logs["extra"]["first"],
    ]
    assert [len(column) for column in columns] == [8] * 6  # one rollout's, not both
    assert list(logs["rewards"]["by_length"]) == [float(len(completion)) for completion in logs["completion"]]
    assert trainer.state.log_history[0]["half"] == 0.5 and trainer._step == 2
    assert trainer._total_train_tokens == trainer.state.log_history[-1]["num_tokens"]
    assert len(trainer._buffered_inputs) == 1 and "advantages" in trainer._buffered_inputs[0]


def test_metrics_that_are_appended_are_logged(config, dataset, tokenizer):
    class Mine(GRPOTrainer):
        def _calculate_rewards(self, *args):
            self._metrics["train"]["mine/mean"].extend([1.0, 3.0])
            self._log_metric("mine/other", 5)
            self._log_completion_extra("mine", list(range(8)))
            return super()._calculate_rewards(*args)

    trainer = trainer_for(config(max_steps=1), dataset, tokenizer, kind=Mine)
    trainer.train()
    row = trainer.state.log_history[0]
    assert (row["mine/mean"], row["mine/other"]) == (2.0, 5.0) and list(trainer._logs["extra"]["mine"]) == [*range(8)]


def test_callbacks_read_the_metrics_of_the_row_that_is_logged(config, dataset, tokenizer):
    seen = []

    class Reads(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                values = trainer._metrics["train"]
                seen.append((values["reward"][:], logs["reward"], values["mine/late"][:]))
                values["mine/late"].append(float(state.global_step))

    trainer = trainer_for(config(max_steps=4, logging_steps=2), dataset, tokenizer, callbacks=[Reads()])
    trainer.train()
    assert [len(rewards) for rewards, *_ in seen] == [2, 2]
    assert all(sum(rewards) / 2 == pytest.approx(logged) for rewards, logged, _ in seen)
    assert [late for *_, late in seen] == [[], [2.0]] and trainer.state.log_history[1]["mine/late"] == 2.0


def test_a_column_of_another_length_is_named(config, dataset, tokenizer):
    class Mine(GRPOTrainer):
        def _calculate_rewards(self, *args):
            self._log_completion_extra("mine", [1])
            return super()._calculate_rewards(*args)

    with pytest.raises(UserError, match="1 values of 'mine' for 8 completions"):
        trainer_for(config(), dataset, tokenizer, kind=Mine).train()


def test_masks_and_weights_by_their_trl_names():
    entropy, mask = torch.tensor([[0.1, 0.9, 0.5, 9.0]]), torch.tensor([[1, 1, 1, 0]])
    found = GRPOTrainer.get_high_entropy_mask(object(), entropy, mask, 0.5)
    assert found.tolist() == [[False, True, True, False]]
    assert not GRPOTrainer.get_high_entropy_mask(object(), entropy, torch.zeros_like(mask), 0.5).any()
    logps, sampled, ones = torch.full((2, 2), -3.0), torch.full((2, 2), -1.0), torch.ones(2, 2)
    kept = GRPOTrainer.get_off_policy_mask(torch.tensor([[1.0], [-1.0]]), logps, sampled, ones, 1.0)
    assert kept.tolist() == [[1.0], [0.0]] and kept.dtype == torch.float32
    phi = GRPOTrainer.get_gamma_weights(
        torch.tensor([[1.0]]), torch.tensor([[math.log(2), 0.0]]), torch.ones(1, 2), None
    )
    assert phi.item() == pytest.approx(4 * math.exp(-3))  # e^3 w^2 e^-3w at w = 2


def test_warnings_of_trl_reach_logging(config, dataset, tokenizer, caplog):
    never = lambda completions, **kwargs: [None] * len(completions)
    given = {"model_init_kwargs": {"dtype": "float32"}, "dataloader_persistent_workers": True, "max_steps": 1}
    with caplog.at_level(logging.WARNING, logger="lowvram_grpo"):
        trainer = trainer_for(config(**given), dataset, tokenizer, never)
        trainer.train()
    for text in (
        "model_init_kwargs will be ignored",
        "dataloader_persistent_workers",
        "All reward functions returned None",
    ):
        assert text in caplog.text and any(text in said for said in trainer.observer.said)
    assert "self-test passed" not in caplog.text


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"peft_config": {"r": 8}}, "peft_config must be"),
        ({"processing_class": "some/tokenizer"}, "processing_class must be a tokenizer, and is a str"),
    ],
)
def test_arguments_of_another_type_are_type_errors(config, dataset, tokenizer, wrong, words):
    with pytest.raises(TypeError, match=words) as caught:
        trainer_for(config(), dataset, tokenizer, **wrong)
    assert isinstance(caught.value, UserError)


def test_datasets_of_another_type_are_type_errors(config, dataset, tokenizer):
    with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset`"):
        trainer_for(config(), DatasetDict(train=dataset), tokenizer)
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        trainer_for(config(), None, tokenizer)


def test_a_quantization_given_twice_is_refused(config, dataset, tokenizer, model_dir):
    from transformers import BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True)
    args = config(model_init_kwargs={"quantization_config": four})
    with pytest.raises(ValueError, match="quantization_config is given twice"):
        trainer_for(args, dataset, tokenizer, model=model_dir, quantization_config=four, peft_config=LORA)


def test_a_tokenizer_without_padding_gets_its_end_token_for_it(config, dataset):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    trainer = trainer_for(config(), dataset, tokenizer)
    assert trainer.processing_class.pad_token_id == tokenizer.eos_token_id == 1 and trainer._tokenizer is tokenizer


def test_a_subclass_puts_prompts_in_order(config, tokenizer):
    class InOrder(GRPOTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    class Grouped(Sampler):
        """As TRL's own, which repeats an index for each completion of its group."""

        def __iter__(self):
            return iter([2, 2, 0, 0, 1, 1])

        def __len__(self):
            return 3

    class InGroups(GRPOTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return Grouped()

    data = Dataset.from_dict({"prompt": ["a", "b", "c"]})
    batches = lambda kind, **s: [
        [row["prompt"] for row in rows]
        for rows in trainer_for(config(**s), data, tokenizer, kind=kind).get_train_dataloader()
    ]
    assert batches(InOrder) == [["a", "b"], ["c"]]
    assert batches(InOrder, num_iterations=2) == [["a", "b"], ["a", "b"], ["c"], ["c"]]
    assert batches(InGroups) == [["c", "a"], ["b"]]
    trainer = trainer_for(config(max_steps=3), data, tokenizer, kind=InOrder)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_model_card_by_trls_arguments(config, dataset, tokenizer, tmp_path):
    trainer = trainer_for(config(max_steps=1), dataset, tokenizer, peft_config=LORA)
    trainer.train()
    trainer.create_model_card(model_name="mine", dataset_name="letters", tags="toy")
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "# mine" in text and "- toy" in text and "- grpo" in text and "letters" in text
    assert os.path.isdir(trainer.args.output_dir)
