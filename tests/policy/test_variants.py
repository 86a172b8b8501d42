"""Adapters that are no plain LoRA: each is trained and saved right, or refused by name before a model is loaded."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig, PeftModel, get_peft_model

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.policy.adapter import adapter_config
from lowvram_grpo.policy.variants import ChangedBase, changes_base

IDS = torch.tensor([[5, 6, 7, 8]])


def lora(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def trainer_for(model, args, dataset, tokenizer, peft_config=None):
    return GRPOTrainer(
        model, digit_share, args, dataset, processing_class=tokenizer, peft_config=peft_config, observer=Quiet()
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
        {"init_lora_weights": "olora", "use_rslora": True},
        {"init_lora_weights": "orthogonal"},
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
        {"lora_bias": True},
    ],
    ids=lambda settings: next(iter(settings.values())) if "init_lora_weights" in settings else next(iter(settings)),
)
def test_saved_for_the_base_that_was_loaded(config, dataset, tokenizer, settings, tmp_path):
    """The reference is the model as it was, and base plus saved adapter is the model that was trained."""
    model = make_model()
    fresh = copy.deepcopy(model)
    trainer = trainer_for(model, config(max_steps=1), dataset, tokenizer, lora(**settings))
    with trainer.reference.active() as reference:
        torch.testing.assert_close(logits(reference), logits(fresh), rtol=1e-4, atol=1e-4)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0
    trained = logits(trainer.model)
    assert (trained - logits(fresh)).abs().max() > 0.05
    trainer.model.save_pretrained(tmp_path / "out")  # as scripts do, past the trainer
    again = PeftModel.from_pretrained(fresh, tmp_path / "out")
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-4)
    assert not changes_base(adapter_config(str(tmp_path / "out")))


def test_resumed_where_the_base_gave_away_a_part(config, dataset, tokenizer):
    whole = trainer_for(make_model(), config(max_steps=4), dataset, tokenizer, lora(init_lora_weights="pissa"))
    whole.train()
    args = config(max_steps=4, save_strategy="steps", save_steps=2)
    first = trainer_for(make_model(), args, dataset, tokenizer, lora(init_lora_weights="pissa"))
    first.train()
    second = trainer_for(make_model(), args, dataset, tokenizer, lora(init_lora_weights="pissa"))
    second.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    torch.testing.assert_close(logits(second.model), logits(whole.model), rtol=1e-4, atol=1e-4)
    kl = [[row["kl"] for row in t.state.log_history if "loss" in row] for t in (whole, second)]
    assert kl[1] == pytest.approx(kl[0], rel=1e-3)


def test_another_decomposition_is_made_good(tmp_path):
    """What another machine took out of the base is not what this one did."""
    one = get_peft_model(make_model(), lora(init_lora_weights="pissa"))
    ChangedBase(one)
    with torch.no_grad():
        for p in (p for p in one.parameters() if p.requires_grad):
            p += 0.1
    one.save_pretrained(tmp_path)
    two = get_peft_model(make_model(), lora(init_lora_weights="olora"))
    ChangedBase(two).restore(two, str(tmp_path))
    torch.testing.assert_close(logits(two), logits(one), rtol=1e-4, atol=1e-4)


REFUSED = [
    (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "type PROMPT_TUNING"),
    (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "type PREFIX_TUNING"),
    (peft.IA3Config(task_type="CAUSAL_LM"), "type IA3"),
    (peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "type LOHA"),
    (lora(init_lora_weights="corda"), "'corda' changes weights"),
    (lora(init_lora_weights="eva"), "'eva' needs data"),
    (lora(init_lora_weights="pissa", modules_to_save=["norm"]), "leaves out modules_to_save"),
    (lora(init_lora_weights="olora", use_dora=True), "leaves out use_dora"),
    (lora(init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 2}), "drop use_rslora"),
    (lora(bias="all"), "bias to 'all'.*beta to 0"),
    (lora(layer_replication=[(0, 2), (1, 2)]), "layer_replication, which is not supported"),
    (lora(alora_invocation_tokens=[3]), "alora_invocation_tokens, which is not supported"),
]


@pytest.mark.parametrize("peft_config,words", REFUSED, ids=[words[:24] for _, words in REFUSED])
def test_refused_before_a_model_is_loaded(config, dataset, tokenizer, peft_config, words):
    with pytest.raises(UserError, match=words) as caught:
        trainer_for("no/such-model", config(), dataset, tokenizer, peft_config)
    assert "\n" not in str(caught.value)


def test_refused_on_a_model_that_came_with_them(config, dataset, tokenizer, model):
    prompts = get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="type PROMPT_TUNING"):
        trainer_for(prompts, config(), dataset, tokenizer)
    two = get_peft_model(make_model(), lora())
    two.add_adapter("other", lora())
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(UserError, match="2 active adapters"):
        trainer_for(two, config(), dataset, tokenizer)
    with pytest.raises(UserError, match="began with is not known"):
        trainer_for(get_peft_model(make_model(), lora(init_lora_weights="pissa")), config(), dataset, tokenizer)
    tied = lora(trainable_token_indices=[5])
    with pytest.raises(UserError, match="tied to the input embedding"):
        trainer_for(make_model(), config(), dataset, tokenizer, tied)


def test_biases_train_where_no_reference_shares_them(config, dataset, tokenizer, tmp_path):
    model = make_model(attention_bias=True)
    fresh = copy.deepcopy(model)
    trainer = trainer_for(model, config(max_steps=1, beta=0.0), dataset, tokenizer, lora(bias="all"))
    trainer.train()
    trainer.save_model(str(tmp_path))
    again = PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(logits(again), logits(trainer.model))


def test_one_configuration_serves_two_models(config, dataset, tokenizer):
    """peft writes module names into the configuration that it is given."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shared = lora()
    trainer_for(make_model(), config(), dataset, tokenizer, shared)
    ids = {"vocab_size": 41, "bos_token_id": None, "eos_token_id": 1}
    other = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64, **ids))
    trainer_for(other, config(), dataset, tokenizer, shared)
    assert shared.target_modules == "all-linear"
