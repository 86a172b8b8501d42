"""The model card: what the hub reads, and what it must not reveal."""

from __future__ import annotations

import pytest
import yaml

from lowvram_grpo.run.model_card import model_card

METRICS = [{"step": i, "reward": float(i), "rewards/label/mean": 5.0, "kl": None} for i in range(1, 31)]


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---")[1])


def test_hub_model():
    recipe = {"model": "Qwen/Qwen2.5-0.5B", "data": "openai/gsm8k", "reward": ["accuracy", "a|b"],
              "system_prompt": None, "training": {"learning_rate": 1e-6}}  # fmt: skip
    card = model_card(recipe, METRICS)
    front = front_matter(card)
    assert front["base_model"] == "Qwen/Qwen2.5-0.5B" and front["datasets"] == ["openai/gsm8k"]
    assert front["library_name"] == "peft" and "grpo" in front["tags"]
    assert "| learning_rate | 1e-06 |" in card and "| reward | accuracy, a\\|b |" in card
    assert "| reward | 5.5 | 25.5 |" in card and "30 optimizer steps" in card
    assert "system_prompt" not in card and "| kl |" not in card


@pytest.mark.parametrize(
    "steps, row, sentence",
    [
        (1, "| reward | 1 |", "1 optimizer step."),
        (3, "| reward | 1 | 3 |", "3 optimizer steps. Means over the first and the last logged row:"),
        (8, "| reward | 2.5 | 6.5 |", "Means over the first and the last 4 logged rows:"),
    ],
)
def test_first_and_last_of_a_short_run_are_not_the_same_rows(steps, row, sentence):
    card = model_card({"model": "a/b", "data": "c/d"}, METRICS[:steps])
    assert row in card.splitlines() and sentence in card


def test_weights_that_were_chosen_say_so():
    best = {"step": 30, "best/step": 20, "best/metric": "eval_reward", "best/value": 0.75, "best/stopped_early": True}
    card = model_card({"model": "a/b", "data": "c/d"}, [*METRICS, best])
    assert "best weights by evaluation: the weights after step 20, whose eval_reward was 0.75, and the run" in card
    assert "best weights" not in model_card({"model": "a/b", "data": "c/d"}, METRICS)


def test_local_paths_stay_private():
    recipe = {"model": "/home/me/models/small", "data": r"C:\Users\me\tldr", "output_dir": "/home/me/run"}
    card = model_card(recipe, [])
    assert "base_model" not in front_matter(card) and "datasets" not in front_matter(card)
    assert "me/" not in card and "Users" not in card
    assert "# LoRA adapter for small" in card and "## Results" not in card
