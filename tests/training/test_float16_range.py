"""A run in float16 of a model that leaves its range: seen before the first rollout, and kept in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.policy.overflow import wide_layers
from lowvram_grpo.training.overflow import FILE


def tiny(overflows: bool):
    """Layer 1 of 2 multiplies two numbers that float16 has not room for."""
    model = make_model()
    if overflows:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(2.0**14)
            model.model.layers[1].mlp.down_proj.weight.mul_(2.0**-8)
    return model.half()


def trainer_of(config, dataset, tokenizer, overflows, **more):
    args = config(save_strategy="steps", save_steps=2, logging_steps=1, gradient_checkpointing=True, **more)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return GRPOTrainer(
        tiny(overflows), digit_share, args, dataset, processing_class=tokenizer, peft_config=lora, observer=Quiet()
    )


def rows_of(trainer):
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


def test_the_run_is_that_of_float32_and_goes_on_bit_for_bit(config, dataset, tokenizer):
    whole = trainer_of(config, dataset, tokenizer, True, max_steps=4, beta=0.04)
    whole.train()
    said = [text for text in whole.observer.said if "float16 ends" in text]
    assert len(said) == 1 and "1 decoder layer of 2 (1) reach" in said[0] and wide_layers(whole.model) == [1]
    assert any(text.startswith("self-test passed") for text in whole.observer.said)
    losses = rows_of(whole)
    assert len(losses) == 4 and all(abs(loss) < 1e3 for loss in losses.values())
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    assert json.loads((checkpoint / FILE).read_text(encoding="utf-8")) == [1]
    resumed = trainer_of(config, dataset, tokenizer, True, max_steps=4, beta=0.04)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert wide_layers(resumed.model) == [1]
    assert rows_of(resumed) == losses
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in whole.model.state_dict().items())


def test_a_run_that_stays_in_range_says_nothing_and_goes_on_so(config, dataset, tokenizer):
    trainer = trainer_of(config, dataset, tokenizer, False, max_steps=2)
    trainer.train()
    assert not [text for text in trainer.observer.said if "float16 ends" in text] and wide_layers(trainer.model) == []
    assert json.loads((Path(trainer.args.output_dir) / "checkpoint-2" / FILE).read_text(encoding="utf-8")) == []


def test_what_a_checkpoint_kept_is_kept_although_today_nothing_would_be(config, dataset, tokenizer):
    trainer = trainer_of(config, dataset, tokenizer, False, max_steps=2)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    (checkpoint / FILE).write_text("[0]", encoding="utf-8")
    trainer = trainer_of(config, dataset, tokenizer, False, max_steps=3)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert wide_layers(trainer.model) == [0]


def test_float32_is_not_looked_at(config, dataset, tokenizer):
    args = config(save_strategy="steps", save_steps=1, max_steps=1)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny(True).float()
    GRPOTrainer(
        model, digit_share, args, dataset, processing_class=tokenizer, peft_config=lora, observer=Quiet()
    ).train()
    assert not (Path(args.output_dir) / "checkpoint-1" / FILE).exists() and wide_layers(model) == []
