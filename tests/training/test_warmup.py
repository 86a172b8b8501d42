"""Signal check and cold start: from a job that cannot learn to one that can."""

from __future__ import annotations

import pytest
import torch
from conftest import Quiet, make_model
from datasets import Dataset
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.training.checks import Signal
from lowvram_grpo.training.cold_start import ColdStart, reference_ids
from lowvram_grpo.training.scoring import score

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
WANTED = "1 2 3"


def exactly(completions, **kwargs):
    """Only the wanted form counts: a random model never writes it."""
    return [1.0 if c.strip() == WANTED else 0.0 for c in completions]


@pytest.fixture
def references():
    prompts = ["a b", "c d", "e f", "g h", "i j", "k l"] * 2
    return Dataset.from_dict({"prompt": prompts, "reference_completion": [WANTED] * len(prompts)})


def train(config, tokenizer, data, peft_config=LORA, **settings):
    base = {"num_generations": 8, "cold_start_learning_rate": 3e-2, "max_steps": 1, "learning_rate": 1e-3}
    args = config(**{**base, **settings})
    trainer = GRPOTrainer(
        make_model(), exactly, args, data, processing_class=tokenizer, peft_config=peft_config, observer=Quiet()
    )
    trainer.train()
    return trainer


def rewards(trainer, name="reward"):
    return [row[name] for row in trainer.state.log_history if name in row and "loss" in row]


@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "all-weights"])
def test_a_cold_start_brings_the_signal(config, tokenizer, references, peft_config, tmp_path):
    settings = {} if peft_config else {"cold_start_learning_rate": 3e-3}
    dead = train(config, tokenizer, references, peft_config, cold_start="off", **settings)
    assert rewards(dead) == [0.0] and "cold start" in " ".join(dead.observer.said)
    alive = train(
        config, tokenizer, references, peft_config, cold_start="auto", output_dir=str(tmp_path / "b"), **settings
    )
    said = " ".join(alive.observer.said)
    assert "with a live signal" in said and "self-test passed" in said
    assert rewards(alive)[0] > 0 and rewards(alive, "frac_reward_zero_std")[0] < 0.5
    assert rewards(alive, "kl") == [0.0]  # the warmed policy is its own reference
    cold = [row for row in alive.state.log_history if "cold_start/step" in row]
    assert cold[0]["cold_start/reward"] == 0 and cold[-1]["cold_start/reward"] > 0
    assert cold[-1]["cold_start/loss"] < cold[1]["cold_start/loss"]
    assert len(cold) - 1 < alive.grpo_args.cold_start_max_steps  # it stopped as soon as it could
    assert (tmp_path / "b" / "cold_start").is_dir()


def test_a_number_of_steps_is_taken_exactly(config, tokenizer, references):
    trainer = train(config, tokenizer, references, cold_start=3)
    assert max(row.get("cold_start/step", 0) for row in trainer.state.log_history) == 3


def test_no_cold_start_where_there_is_a_signal(config, tokenizer, references, dataset):
    from conftest import digit_share

    data = references.add_column("answer", ["1"] * len(references))
    args = config(cold_start="auto", max_steps=1)
    trainer = GRPOTrainer(
        make_model(), digit_share, args, data, processing_class=tokenizer, peft_config=LORA, observer=Quiet()
    )
    trainer.train()
    assert not any("cold_start/step" in row for row in trainer.state.log_history)


def test_a_cold_start_without_references_is_refused(config, tokenizer, dataset):
    with pytest.raises(UserError, match="reference_completion"):
        train(config, tokenizer, dataset, cold_start=3)
    assert rewards(train(config, tokenizer, dataset, cold_start="auto")) == [0.0]


def test_its_loss_is_the_mean_negative_log_prob(tokenizer, model):
    pairs = [([5, 6], [7, 8, 1]), ([9], [10, 1]), ([4, 3, 2], [11, 12, 13, 14, 1])]
    warm = ColdStart(model, lambda step: pairs, learning_rate=0.0, guarded=lambda work, undo: work(2, 1), pad_id=0)
    total = 0.0
    for prompt, completion in pairs:
        ids = torch.tensor([prompt + completion])
        logp = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
        total -= float(logp.detach().gather(1, torch.tensor(completion)[:, None]).sum())
    assert warm.step(0, torch.enable_grad) == pytest.approx(total / 10, rel=1e-5)
    # and learning on it makes the references likelier
    warm = ColdStart(model, lambda step: pairs, learning_rate=1e-2, guarded=lambda work, undo: work(2, 1), pad_id=0)
    losses = [warm.step(i, torch.enable_grad) for i in range(8)]
    assert losses[-1] < losses[0] / 2
    assert score(model, *map(torch.tensor, ([[5, 6]], [[1, 1]], [[7]], [[1]])), temperature=1.0, workspace_mib=1)


@pytest.mark.parametrize("count, words", [(1, "1 fitting reference would"), (7, "7 fitting references would"), (8, "")])
def test_few_references_are_not_learned_by_heart(config, tokenizer, references, count, words):
    trainer = train(config, tokenizer, references.select(range(count)), cold_start="auto", cold_start_max_steps=4)
    said = " ".join(trainer.observer.said)
    cold = any("cold_start/step" in row for row in trainer.state.log_history)
    assert cold is (count >= 8) and ("no automatic cold start" in said) is not cold and words in said
    assert ("warm the adapter up" in said) is cold


def test_a_single_reference_is_used_where_it_is_asked_for(config, tokenizer, references):
    trainer = train(config, tokenizer, references.select([0]), cold_start=1)
    said = trainer.observer.said
    assert any(text == "cold start: 1 supervised step on 1 reference." for text in said)
    assert any(text.startswith("cold start ended after 1 step with") for text in said)


def always(completions, **kwargs):
    return [1.0] * len(completions)


def never(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize("functions, cold", [([always], False), ([always, never], True), ([never], True)])
def test_a_saturated_reward_is_no_missing_signal(config, tokenizer, references, functions, cold):
    """Warming up a policy that already earns all there is could only make it worse."""
    args = config(cold_start="auto", cold_start_max_steps=1, max_steps=1)
    trainer = GRPOTrainer(
        make_model(), functions, args, references, processing_class=tokenizer, peft_config=LORA, observer=Quiet()
    )
    trainer.train()
    assert any("cold_start/step" in row for row in trainer.state.log_history) is cold
    assert any("nothing is left to learn" in text for text in trainer.observer.said) is not cold


def test_a_cold_start_ends_where_nothing_is_left_to_learn(config, tokenizer, references):
    """With sampling as good as greedy, the first form that is learnt makes every reward 1."""
    trainer = train(config, tokenizer, references, cold_start="auto", temperature=1e-3)
    said = " ".join(trainer.observer.said)
    assert "nothing left to learn" in said and "mean reward 1.00" in said
    steps = max(row.get("cold_start/step", 0) for row in trainer.state.log_history)
    assert steps < trainer.grpo_args.cold_start_max_steps


def test_references_end_with_the_end_token(tokenizer):
    assert reference_ids(tokenizer, "1 2") == [4, 5, 1]


def test_references_that_do_not_fit_are_left_out(config, tokenizer):
    """A reference that is cut off would teach the model never to finish."""
    data = Dataset.from_dict({"prompt": ["a b", "c d"] * 4, "reference_completion": ["1 2 3", "1 2 3 4 5 6 7"] * 4})
    trainer = train(config, tokenizer, data, cold_start=1, max_completion_length=4)
    assert any("4 of 8 references are longer" in text for text in trainer.observer.said)
    with pytest.raises(UserError, match="raise max_completion_length"):
        train(config, tokenizer, data, cold_start=1, max_completion_length=3)


@pytest.mark.parametrize(
    "signal,references,words",
    [
        (Signal(1.0, 0.0, ("label",), 0.0), True, ["100%", "label never fired", "cold start"]),
        (Signal(1.0, 0.9, ("label",), 0.0), False, ["90%", "max_completion_length"]),
        (Signal(1.0, 0.0, ("label",), 0.0), False, ["--few-shot"]),
        (Signal(0.6, 0.0, (), 1.0), False, ["num_generations"]),
        (Signal(0.1, 0.0, (), 1.0), False, ["10%"]),
        (Signal(1.0, 0.0, (), 1.0, equal=True), True, ["same reward of 1.00", "nothing is left to learn", "harder"]),
        (Signal(1.0, 0.0, ("label",), 0.5, equal=True), True, ["label never fired", "cold start"]),
    ],
)
def test_the_sentence_names_the_remedy(signal, references, words):
    sentence = signal.sentence(has_references=references)
    for word in words:
        assert word in sentence
    assert sentence.count(". ") == 0 and ("GRPO learns only" in sentence) is not (signal.alive or signal.saturated)
