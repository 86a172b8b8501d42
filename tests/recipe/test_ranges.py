"""Every number is held against its range before anything is loaded."""

from __future__ import annotations

import math
import re

import pytest

from lowvram_grpo import GRPOConfig, UserError
from lowvram_grpo.recipe.ranges import LORA_RANGES, TRAINING_RANGES, Range
from lowvram_grpo.recipe.resolve import Recipe, resolve


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("learning_rate", -1.0, "at least 0"),
        ("learning_rate", math.nan, "at least 0"),
        ("learning_rate", math.inf, "at least 0"),
        ("max_steps", -5, "at least 1, or -1"),
        ("max_steps", 0, "at least 1, or -1"),
        ("num_train_epochs", 0, "above 0"),
        ("temperature", 0.0, "above 0: at 0 all completions of a group are the same"),
        ("num_generations", 1, "at least 2: GRPO compares"),
        ("max_completion_length", 0, "at least 1"),
        ("max_prompt_length", -1, "at least 1"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("top_k", -1, "at least 0"),
        ("min_p", 2.0, "at most 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("rollout_batch_size", 0, "at least 1"),
        ("reward_weights", [1.0, math.nan], "a finite number"),
        ("seed", -1, "at least 0"),
        ("learning_rate", "fast", "must be a number"),
        ("entropy_target", "high", "'high'; it must be a finite number\\.$"),
        ("entropy_target", math.nan, "nan; it must be a finite number\\.$"),
        (
            "loss_type",
            "gspo",
            "'gspo' \\(write importance_sampling_level sequence, with loss_type grpo\\); it must be",
        ),
        ("scale_rewards", "grop", "\\(did you mean 'group'\\?\\)"),
    ],
)
def test_out_of_range(tmp_path, name, value, words):
    with pytest.raises(UserError, match=f"^{name} is .*{words}"):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    "name,value", [("lora_r", 0), ("lora_r", -4), ("lora_alpha", 0), ("lora_dropout", 1.0), ("lora_dropout", math.nan)]
)
def test_lora_out_of_range(name, value):
    with pytest.raises(UserError, match=f"^{name} is "):
        resolve({name: value})


def test_the_defaults_and_the_bounds_themselves_are_in_range(tmp_path):
    edges = {"max_steps": -1, "top_p": 1.0, "top_k": None, "beta": 0.0, "num_generations": 2, "learning_rate": 0.0}
    assert GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **edges).top_p == 1.0
    assert resolve({"lora_dropout": 0.0, "lora_r": 1}).lora_r == 1


def test_every_name_in_the_tables_is_a_setting():
    assert TRAINING_RANGES.keys() <= GRPOConfig.__dataclass_fields__.keys()
    assert LORA_RANGES.keys() <= Recipe.__dataclass_fields__.keys()


def test_bounds():
    half_open = Range(above=0, at_most=1)
    assert [x in half_open for x in (0, 1e-9, 1, 1.1, math.nan)] == [False, True, True, False, False]
    assert [x in Range(at_least=0, below=1) for x in (0, 1)] == [True, False]
    assert math.inf not in Range() and -3 in Range() and -1 in Range(at_least=1, also=(-1, "all"))


@pytest.mark.parametrize(
    "fields,words",
    [
        ((6, 3, {"steps_per_generation": 4}), "steps_per_generation 4 .* 24 .* of 18; a step uses 24"),
        ((6, 3, {"steps_per_generation": 5}), "of 18; a step uses 15"),
        ((6, 3, {"generation_batch_size": 30}), "generation_batch_size 30"),
        ((6, 1, {"steps_per_generation": 2, "num_generations": 4}), None),
        ((6, 3, {"steps_per_generation": 6}), None),
        ((6, 3, {}), None),
        ((5, 1, {}), "5 completions a step do not make whole groups of 3; a step uses 6"),
    ],
)
def test_a_step_of_another_size_is_said(tmp_path, fields, words):
    rows, accumulate, others = fields
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **{"num_generations": 3, **others},
                      per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate)  # fmt: skip
    said = [text for text in args.notices() if "a step uses" in text]
    assert len(said) == (words is not None)
    assert words is None or re.search(words, said[0])


def test_a_ratio_of_sequences_that_counts_their_tokens_is_said(tmp_path):
    for loss_type in ("grpo", "bnpo", "dapo", "dr_grpo"):
        args = GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, loss_type=loss_type, importance_sampling_level="sequence"
        )
        assert any("weighs each sequence by its length" in n for n in args.notices()) is (loss_type != "grpo")
