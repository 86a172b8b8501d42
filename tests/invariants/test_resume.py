"""A run that was cut off and resumed takes the same steps as one that was not."""

from __future__ import annotations

import pytest
import torch
from conftest import digit_share, make_model
from datasets import Dataset
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def run(config, dataset, tokenizer, peft_config, *, resume=None, **settings):
    args = config(save_strategy="steps", save_steps=1, max_steps=7, **settings)
    trainer = GRPOTrainer(make_model(), digit_share, args, dataset, processing_class=tokenizer, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=resume)
    rows = {r["step"]: r for r in trainer.state.log_history if "loss" in r}
    return rows, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "all-weights"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 2},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
        {"lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "prompts_per_step": 5},
    ],
    ids=["plain", "mid-rollout", "moving-reference", "second-epoch-cosine"],
)
def test_resume_is_exact(config, dataset, tokenizer, peft_config, settings, tmp_path):
    whole, weights = run(config, dataset, tokenizer, peft_config, output_dir=str(tmp_path / "a"), **settings)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    torch.manual_seed(12345)  # a new process has other global random numbers
    rest, again = run(
        config, dataset, tokenizer, peft_config, output_dir=str(tmp_path / "b"), resume=checkpoint, **settings
    )
    for step in range(4, 8):
        for name in ("loss", "reward", "kl", "entropy", "learning_rate", "grad_norm", "num_tokens"):
            assert rest[step].get(name) == whole[step].get(name), (step, name)
    for name, value in weights.items():
        assert torch.equal(value, again[name]), name


def test_resume_in_the_middle_of_a_rollout_draws_the_same_dropout(config, dataset, tokenizer, tmp_path):
    """The resumed process asks in a pass with a gradient, for the first time, whether the model can share prompts."""
    dropping = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"num_iterations": 2, "shared_prefix": "on"}
    whole, weights = run(config, dataset, tokenizer, dropping, output_dir=str(tmp_path / "a"), **settings)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    torch.manual_seed(12345)
    rest, again = run(
        config, dataset, tokenizer, dropping, output_dir=str(tmp_path / "b"), resume=checkpoint, **settings
    )
    assert [rest[s]["loss"] for s in range(4, 8)] == [whole[s]["loss"] for s in range(4, 8)]
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "all-weights"])
def test_resume_after_a_cold_start_keeps_its_reference(config, tokenizer, tmp_path, peft_config):
    data = Dataset.from_dict({"prompt": ["a b", "c d", "e f", "g h"] * 3, "reference_completion": ["1 2 3"] * 12})
    settings = {"cold_start": 4, "cold_start_learning_rate": 1e-2}
    whole, weights = run(config, data, tokenizer, peft_config, output_dir=str(tmp_path / "a"), **settings)
    assert whole[1]["kl"] == 0
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    rest, again = run(
        config, data, tokenizer, peft_config, output_dir=str(tmp_path / "b"), resume=checkpoint, **settings
    )
    assert [rest[s]["kl"] for s in range(4, 8)] == [whole[s]["kl"] for s in range(4, 8)]
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
