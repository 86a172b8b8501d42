"""What a recipe says without saying it."""

from __future__ import annotations

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.implied import IMPLIED, imply_evaluation
from lowvram_grpo.recipe import resolve


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


def test_an_evaluation_needs_data():
    with pytest.raises(UserError, match=r"eval_strategy is steps.*--eval-data"):
        imply_evaluation(resolve({"eval_strategy": "steps"}))
