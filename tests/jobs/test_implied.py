"""What a recipe says without saying it."""

from __future__ import annotations

import pytest
from peft import LoraConfig

from lowvram_grpo.errors import UserError
from lowvram_grpo.jobs.implied import IMPLIED, adopt_adapter, imply_evaluation
from lowvram_grpo.recipe.resolve import resolve


@pytest.mark.parametrize(
    "settings,strategy,steps",
    [
        ({"eval_data": "d"}, "steps", 50),
        ({"eval_split": "test", "save_steps": 20}, "steps", 20),
        ({"eval_split": "test", "eval_steps": 5}, "steps", 5),
        ({"eval_data": "d", "eval_strategy": "epoch"}, "epoch", None),
        ({"eval_data": "d", "eval_strategy": "no"}, "no", None),
        ({"eval_data": "d", "eval_strategy": "steps"}, "steps", 50),
        ({}, None, None),
    ],
)
def test_evaluation_data_is_used(settings, strategy, steps):
    recipe = resolve(settings)
    imply_evaluation(recipe)
    assert (recipe.training.get("eval_strategy"), recipe.training.get("eval_steps")) == (strategy, steps)
    assert (recipe.origin.get("eval_strategy") == IMPLIED) == (strategy is not None and "eval_strategy" not in settings)


EPOCHS = {"eval_strategy": "epoch"}


@pytest.mark.parametrize(
    "settings,best,strategy,steps",
    [
        ({"early_stopping": 3}, True, "steps", 50),
        ({"early_stopping": 3, "eval_steps": 20}, True, "steps", 20),
        ({"early_stopping": 3, "load_best_model_at_end": False, "eval_steps": 20}, False, None, 50),
        ({"early_stopping": 3, "save_strategy": "no"}, None, "no", 50),
        ({"load_best_model_at_end": True, "eval_steps": 20, "save_steps": 40}, True, "steps", 40),
        ({"load_best_model_at_end": True, **EPOCHS}, True, "epoch", 50),
        ({"load_best_model_at_end": True, "save_strategy": "best", "eval_steps": 20}, True, "best", 50),
        ({"early_stopping": 0, "eval_steps": 20}, None, None, 50),
        # Its file says 50, and nobody has: it was the default.
        ({"early_stopping": 3, "eval_steps": 20, "resume": "r"}, True, "steps", 20),
    ],
    ids=str,
)
def test_the_best_weights_are_saved_when_they_are_evaluated(settings, best, strategy, steps):
    recipe = resolve({"eval_data": "d", **settings})
    if recipe.resume:
        recipe.origin["save_steps"] = "file"
    imply_evaluation(recipe)
    training = recipe.training
    assert training.get("load_best_model_at_end") is best
    assert (training.get("save_strategy"), training["save_steps"]) == (strategy, steps)


def test_an_evaluation_needs_data():
    with pytest.raises(UserError, match=r"early_stopping is set.*--eval-data"):
        imply_evaluation(resolve({"early_stopping": 2}))
    with pytest.raises(UserError, match=r"eval_strategy is steps.*--eval-data"):
        imply_evaluation(resolve({"eval_strategy": "steps"}))


def leave_adapter(folder):
    LoraConfig(r=4, target_modules="all-linear").save_pretrained(folder)
    (folder / "adapter_model.safetensors").touch()


@pytest.mark.parametrize(
    "flags,kept,said",
    [
        ({}, ("none", "dense"), 1),
        ({"quantization": "nf4"}, ("nf4", "dense"), 1),
        ({"model": "another"}, ("nf4", "int8"), 0),
        ({"preset": "24gb"}, ("none", "dense"), 0),
    ],
    ids=str,
)
def test_an_adapter_goes_on_on_the_base_that_it_has_learned_on(flags, kept, said, tmp_path):
    """A plan that climbed wrote it into the run's recipe; the preset says something else."""
    begun = resolve({"model": "m", "preset": "8gb", "quantization": "none", "head_dtype": "dense"})
    (tmp_path / "recipe.toml").write_text(begun.to_toml(), encoding="utf-8")
    leave_adapter(tmp_path / "adapter")
    told = []
    recipe = resolve({"model": "m", "preset": "8gb", "adapter": str(tmp_path / "adapter"), **flags})
    adopt_adapter(recipe, told.append)
    assert recipe.lora_r == 4 and len(told) == said
    assert (recipe.quantization, recipe.training["head_dtype"]) == kept


def test_an_adapter_of_no_run_says_nothing_of_its_base(tmp_path):
    (tmp_path / "recipe.toml").write_text("learning = true", encoding="utf-8")
    leave_adapter(tmp_path / "adapter")
    recipe, told = resolve({"model": "m", "preset": "8gb", "adapter": str(tmp_path / "adapter")}), []
    adopt_adapter(recipe, told.append)
    assert recipe.quantization == "nf4" and not told
