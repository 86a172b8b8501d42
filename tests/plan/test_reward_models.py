"""Reward models in the memory plan: bytes where they are, and the cheapest place that fits."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from lowvram_grpo.cli.app import app
from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.cards import typical
from lowvram_grpo.memory.ladder import PHASES, REWARD
from lowvram_grpo.memory.overheads import on
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.plan.paper import setting
from lowvram_grpo.plan.planner import Planner
from lowvram_grpo.plan.prediction import Prediction
from lowvram_grpo.plan.reward_models import CATEGORY, Judge, judge_of, with_reward_models
from lowvram_grpo.recipe.resolve import resolve

MIB = 2**20
MODEL = "Qwen2.5-0.5B"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The configuration of a reward model of 8 layers; nothing else of it is needed."""
    folder = tmp_path_factory.mktemp("judges") / "judge"
    LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, vocab_size=32000,
        num_labels=1, dtype="bfloat16", max_position_embeddings=4096, tie_word_embeddings=False,
        architectures=["LlamaForSequenceClassification"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def planner():
    return Planner(resolve_config(MODEL)[0], card=typical(8))


def recipe(*rewards, **flags):
    lengths = {"max_prompt_length": 256, "max_completion_length": 256, "memory_plan": "savers"}
    return resolve({"model": MODEL, "preset": "8gb", "reward": list(rewards), **lengths, **flags})


def weights_of(layers=8, hidden=1024, inner=2816, vocabulary=32000):
    layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    return 2 * (layers * layer + vocabulary * hidden + hidden + hidden)


def test_weights_and_activations_are_counted(judge):
    short, long = judge_of(judge, 256, typical(8)), judge_of(judge, 512, typical(8))
    assert short.weights == long.weights == pytest.approx(weights_of(), rel=0.01)
    # At its widest, an MLP's two halves of 8 rows stand beside their product.
    widest = 8 * 512 * 2816 * 2 * 3
    assert widest <= long.activations <= 3 * widest
    assert long.activations == pytest.approx(2 * short.activations, rel=0.1)


def test_each_place_costs_what_is_there(judge, planner):
    bare = planner.predict(recipe("accuracy"))
    on_card, in_turn, on_cpu = (
        planner.predict(recipe(judge, reward_model_device=place)) for place in ("cuda", "in_turn", "cpu")
    )
    weights = judge_of(judge, 512, typical(8)).weights
    assert on_cpu.phases == bare.phases and REWARD not in bare.phases
    for name in PHASES:
        assert on_card.phases[name] == bare.phases[name] + weights
        assert in_turn.phases[name] == bare.phases[name]
        assert on_card.parts[name][CATEGORY] == weights and CATEGORY not in in_turn.parts[name]
    assert in_turn.phases[REWARD] == on_card.phases[REWARD] > weights + bare.parts["rollout"]["base weights"]
    for found in (on_card, in_turn):
        assert sum(found.parts[REWARD].values()) == found.phases[REWARD]
        assert found.categories == found.parts[found.peak_phase]
    assert planner.predict(recipe(judge)).phases == on_card.phases  # auto


def test_of_several_one_is_there_in_turn(judge, planner):
    one, two = (planner.predict(recipe(*[judge] * n, reward_model_device="in_turn")) for n in (1, 2))
    assert one.phases == two.phases
    both = planner.predict(recipe(judge, judge))
    weights = judge_of(judge, 512, typical(8)).weights
    assert both.phases[REWARD] == one.phases[REWARD] + weights


class Told(Planner):
    """Predicts by a formula: a base, and rows in the backward pass."""

    def predict(self, recipe, *, exact=False):
        rows = setting(recipe, "per_device_train_batch_size")
        bytes_of = {"load": 1000, "rollout": 1400, "backward": 1000 + 100 * rows}
        parts = {"rollout": {"base weights": 1000}}
        found = Prediction({name: size * MIB for name, size in bytes_of.items()}, {}, {
            name: {key: size * MIB for key, size in parts.get(name, {}).items()} for name in bytes_of
        })  # fmt: skip
        judges = [Judge(500 * MIB, 50 * MIB)] * len(recipe.reward)
        place = setting(recipe, "reward_model_device")
        return with_reward_models(found, judges, place, on("cuda", None))


@pytest.mark.parametrize(
    ("budget", "rungs"),
    [
        (1900, []),
        (1600, ["reward_model_device=in_turn"]),
        (1510, ["reward_model_device=in_turn", "reward_model_device=cpu"]),
    ],
)
def test_the_cheapest_place_that_fits_is_taken(judge, budget, rungs):
    plan = Told(None).plan(recipe(judge, per_device_train_batch_size=4), budget * MIB, advise=False)
    assert plan.fits and list(map(str, plan.rungs)) == rungs
    assert plan.recipe.origin.get("reward_model_device") == ("memory plan" if rungs else None)


def test_what_a_person_has_set_stays(judge):
    config, _ = resolve_config("Qwen2.5-0.5B")
    plan = Told(config).plan(recipe(judge, reward_model_device="cuda"), 1600 * MIB, advise=False)
    assert setting(plan.recipe, "reward_model_device") == "cuda"
    assert not any("reward_model" in str(rung) for rung in plan.rungs)


def test_a_reward_that_is_no_model_there_is_named(planner, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"The reward model .*empty' has no configuration to plan with"):
        planner.predict(recipe(str(tmp_path / "empty")))


def test_plan_shows_them(judge, capsys):
    app(
        ["plan", "-m", MODEL, "--vram", "8", "--reward", judge, "--json", "--memory-plan", "savers"],
        standalone_mode=False,
    )
    found = json.loads(capsys.readouterr().out)
    assert REWARD in found["phases"] and found["settings"]["reward_model_device"] == "auto"
    app(["plan", "-m", MODEL, "--vram", "8", "--reward", judge, "--memory-plan", "savers"], standalone_mode=False)
    assert "\nreward " in capsys.readouterr().out
