"""What the first rollouts are said to mean."""

from __future__ import annotations

import pytest
import torch
from conftest import Quiet, digit_share, make_tokenizer
from datasets import Dataset
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.errors import UserError
from lowvram_grpo.objective import group_advantages
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.training.checks import endless_remedy, self_test, signal_of, unjudged_row
from lowvram_grpo.training.experience import Rollout

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def rollout_of(rewards, ids=None, truncated=True):
    """Two groups of two completions; `rewards` is one row a completion, None where a function did not apply."""
    per_func = torch.tensor([[float("nan") if r is None else r for r in row] for row in rewards])
    total = per_func.nansum(1)
    total[per_func.isnan().all(1)] = torch.nan
    ids = ids or [[5, 6]] * 4
    batch = RolloutBatch([[3]] * 4, ids, [torch.zeros(len(i)) for i in ids], [truncated] * 4)
    return Rollout(batch, ["p", "p", "q", "q"], list("abcd"), total, per_func, group_advantages(total, 2), {})


def test_rewards_that_judge_nothing_are_named_with_a_reference():
    signal = signal_of(rollout_of([[None, None]] * 4), ["accuracy", "format"], reference="Yes")
    text = signal.sentence(has_references=True)
    assert "accuracy, format gave None to every completion, as for the reference 'Yes'" in text
    assert "max_completion_length" not in text and "cold start" not in text
    one = signal_of(rollout_of([[None], [None], [1.0], [0.0]]), ["accuracy"], reference="Yes")
    assert not one.unjudged and one.reference is None
    assert "as for" not in signal_of(rollout_of([[None]] * 4), ["accuracy"]).sentence(has_references=False)
    long = signal_of(rollout_of([[None]] * 4), ["accuracy"], reference="x" * 9999).sentence(has_references=False)
    assert len(long) < 400


def test_the_row_that_nobody_judged_is_named_as_in_trl():
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "No"}]
    text = unjudged_row(rollout_of([[1.0], [0.0], [1.0], [None]]), rows)
    assert text.startswith("All reward functions returned None for the following kwargs: ")
    assert "prompt='q'" in text and "answer='No'" in text and "completion='d'" in text
    assert unjudged_row(rollout_of([[1.0], [0.0], [1.0], [0.0]]), rows) is None
    assert unjudged_row(rollout_of([[1.0, None]] * 4), rows) is None


def test_a_penalty_that_nothing_earned_is_no_silence():
    rollout = rollout_of([[1.0, 0.0]] * 4)
    signal = signal_of(rollout, ["r", "penalty"], penalties=["penalty"])
    assert not signal.silent and signal.saturated
    assert signal_of(rollout, ["r", "penalty"]).silent == ("penalty",)
    assert signal_of(rollout_of([[1.0, None]] * 4), ["r", "penalty"], penalties=["penalty"]).silent == ("penalty",)


def test_truncated_completions_that_are_all_left_out():
    cut, some = rollout_of([[1.0], [0.0]] * 2), rollout_of([[1.0], [0.0]] * 2, truncated=False)
    text = signal_of(cut, ["r"], masked=True).sentence(has_references=False)
    assert text.endswith("leaves all out, so there is nothing to learn from: raise max_completion_length, or drop "
                         "mask_truncated_completions.")  # fmt: skip
    for signal in (signal_of(cut, ["r"]), signal_of(some, ["r"], masked=True)):
        assert "leaves all out" not in signal.sentence(has_references=False)


def test_a_model_that_never_ends_is_named():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    end = tokenizer.convert_tokens_to_ids("<end>")
    plain, turns = rollout_of([[1.0], [0.0]] * 2), rollout_of([[1.0], [0.0]] * 2, ids=[[5, end, 6]] * 3 + [[5]])
    assert endless_remedy(plain, tokenizer, (1,), 16) == ""  # it had no room
    assert endless_remedy(rollout_of([[1.0]] * 4, truncated=False), tokenizer, (1,), 999) == ""
    text = endless_remedy(plain, tokenizer, (1,), 256)
    assert "no completion wrote an end token (<eos>) in 256 tokens" in text and "--few-shot" in text
    text = endless_remedy(turns, tokenizer, (1,), 16)
    assert f"most wrote <end>: stop there as well, with --generation-kwargs '{{\"eos_token_id\": [1, {end}]}}'" in text
    for rewards in ([[1.0], [0.0]] * 2, [[0.0]] * 4):
        said = signal_of(rollout_of(rewards), ["r"], endless=text).sentence(has_references=False)
        assert text in said and "raise max_completion_length" not in said and said.count(". ") == 0


def test_it_is_all_said_before_step_one(config, tokenizer, model):
    data = Dataset.from_dict({"prompt": ["a b", "c d"] * 4, "answer": ["Yes", "No"] * 4,
                              "reference_completion": ["1 2"] * 8})  # fmt: skip
    never = lambda completions, **kwargs: [None] * len(completions)
    args = config(cold_start="auto", max_steps=1)
    trainer = GRPOTrainer(model, never, args, data, processing_class=tokenizer, peft_config=LORA, observer=Quiet())
    trainer.train()
    said = trainer.observer.said
    assert sum("All reward functions returned None" in text for text in said) == 1
    assert any("gave None to every completion, as for the reference" in text for text in said)
    assert not any("cold start" in text for text in said)  # which could not make them judge


@pytest.mark.parametrize("logging_steps,rows", [(1, [1, 2, 3, 3]), (2, [2, 3])])
def test_the_last_row_has_what_no_row_had_or_the_last_one_again(config, dataset, tokenizer, model, logging_steps, rows):
    args = config(max_steps=3, logging_steps=logging_steps)
    trainer = GRPOTrainer(
        model, digit_share, args, dataset, processing_class=tokenizer, peft_config=LORA, observer=Quiet()
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    assert [row["step"] for row in log] == rows
    assert all("completions/mean_length" in row and "num_tokens" in row for row in log)
    assert "train_runtime" in log[-1] and "train_runtime" not in log[-2]
    assert (log[-1]["reward"] == log[-2]["reward"]) is (logging_steps == 1)


@pytest.mark.parametrize("gap, says", [(0.01, "nats a token."), (0.105, "much for rounding alone"), (0.29, "much")])
def test_what_half_precision_may_differ_by_is_said(gap, says):
    """0.105 is what 24 layers of random weights differed by on an H200, with nothing wrong."""
    mask = torch.ones(2, 3)
    assert says in self_test(torch.full((2, 3), gap), torch.zeros(2, 3), None, mask, torch.bfloat16)


def test_no_rounding_explains_a_missing_mask():
    with pytest.raises(UserError, match="does not score what it sampled"):
        self_test(torch.full((2, 3), 0.35), torch.zeros(2, 3), None, torch.ones(2, 3), torch.bfloat16)
