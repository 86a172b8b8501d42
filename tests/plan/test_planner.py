"""The planner goes down the ladder no further than it must, and says what would fit where nothing does."""

from __future__ import annotations

import json

import pytest

from lowvram_grpo.cli.app import app
from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import AT_LOAD, RELIEVES, Rung, next_rung
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.plan.paper import ladder_of, setting, with_setting
from lowvram_grpo.plan.planner import GIB, Planner
from lowvram_grpo.plan.prediction import Prediction
from lowvram_grpo.recipe import preset as presets
from lowvram_grpo.recipe.resolve import resolve
from tests.conftest import make_model

LENGTHS = {"num_generations": 8, "max_prompt_length": 256, "max_completion_length": 300}


def recipe_for(model: str = "Qwen2.5-7B", preset: str = "8gb", **flags):
    return resolve({"model": model, "preset": preset, **LENGTHS, **flags})


class Told(Planner):
    """Predicts by a formula: rows cost in the backward pass, waves in the rollout, the base in both."""

    def __init__(self, config=None, **kwargs):
        super().__init__(config)
        self.asked = 0

    def plan(self, recipe, budget, **kwargs):
        """The ladder alone: what is streamed is weighed by real predictions (test_streamed_layers.py)."""
        return super().plan(with_setting(recipe, "weight_offload", "off", "flag"), budget, **kwargs)

    def predict(self, recipe, *, exact=False):
        self.asked += 1
        base = {"none": 14, "nf4": 4}[recipe.quantization]
        length = setting(recipe, "max_completion_length") / 300
        rows = setting(recipe, "per_device_train_batch_size") / (2 if setting(recipe, "activation_offload") else 1)
        waves = setting(recipe, "rollout_batch_size")
        phases = {"load": base, "rollout": base + waves / 16 * length, "backward": base + rows / 2 * length}
        return Prediction({name: int(size * GIB) for name, size in phases.items()})


def test_what_fits_is_left_alone():
    plan = Told().plan(recipe_for(), 8 * GIB)
    assert plan.fits and not plan.rungs


def test_only_rungs_that_relieve_the_peak_are_taken():
    plan = Told().plan(recipe_for(), int(5.2 * GIB))
    assert plan.fits
    assert list(map(str, plan.rungs)) == ["rollout_batch_size=16", "per_device_train_batch_size=2"]
    assert setting(plan.recipe, "rollout_batch_size") == 16
    assert plan.recipe.origin["rollout_batch_size"] == "memory plan"


def test_what_a_person_set_stays():
    recipe = recipe_for(per_device_train_batch_size=4, rollout_batch_size=32)
    plan = Told().plan(recipe, int(5.5 * GIB), advise=False)
    assert setting(plan.recipe, "rollout_batch_size") == 32
    assert setting(plan.recipe, "per_device_train_batch_size") == 4
    assert not plan.fits


def test_advice_where_nothing_fits(monkeypatch):
    monkeypatch.setattr(Told, "_smaller_model", lambda self, plan: "Qwen2.5-3B")
    plan = Told().plan(recipe_for(per_device_train_batch_size=4, rollout_batch_size=32), int(5.1 * GIB))
    text = "; ".join(plan.advice)
    assert "--max-completion-length 150 fits" in text and "Qwen2.5-3B fits" in text
    assert plan.as_json()["advice"] == list(plan.advice)


@pytest.mark.parametrize("name", presets.names())
def test_every_rung_of_every_preset_is_known_and_typed(name):
    for rung in ladder_of(name):
        assert rung.key in RELIEVES
        assert not isinstance(rung.value, str) or rung.key in AT_LOAD
        assert rung.words


def test_the_next_rung_goes_on_below_a_preset():
    settings = {
        "rollout_batch_size": 3, "per_device_train_batch_size": 1, "activation_offload": True, "mlp_tile": 512,
        "workspace_mib": 64, "optimizer_offload": False, "gradient_checkpointing": True,
    }  # fmt: skip
    ladder = (Rung("head_dtype", "nf4"), Rung("mlp_tile", 768), Rung("workspace_mib", 48))
    assert next_rung("backward", settings, ladder) == Rung("workspace_mib", 48)
    assert next_rung("backward", settings) == Rung("mlp_tile", 256)
    assert next_rung("rollout", settings) == Rung("rollout_batch_size", 2)
    assert next_rung("optimizer", settings) == Rung("optimizer_offload", True)
    settings |= {"rollout_batch_size": 1, "workspace_mib": 8, "optimizer_offload": True}
    assert next_rung("rollout", settings) is None


# The bounds, GiB, CUDA context included.
BOUNDS = {
    "Qwen2.5-0.5B": 1.6,
    "Qwen2.5-1.5B": 2.6,
    "Qwen2.5-3B": 3.6,
    "Qwen2.5-7B": 5.8,
    "Qwen3-8B": 6.3,
    "Qwen3-14B": 10.5,
}


@pytest.mark.parametrize("model", BOUNDS)
def test_the_peaks_that_are_promised(model):
    card = 12 if model == "Qwen3-14B" else 8
    config, _ = resolve_config(model)
    plan = Planner(config).plan(recipe_for(model, f"{card}gb"), presets.card_budget(card))
    assert plan.fits
    assert plan.prediction.peak / GIB <= BOUNDS[model]


def test_a_given_adapter_makes_room_for_its_reference():
    config, _ = resolve_config("Qwen2.5-0.5B")
    alone, both = (Planner(config, cold_start=cold).predict(recipe_for("Qwen2.5-0.5B")) for cold in (False, True))
    assert both.parts["optimizer"]["adapter"] == 2 * alone.parts["optimizer"]["adapter"]


def run(capsys, *arguments: str) -> str:
    app(["plan", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_plan_prints_json_for_a_local_config(tmp_path, capsys):
    make_model().config.save_pretrained(tmp_path)
    found = json.loads(run(capsys, "--model", str(tmp_path), "--vram", "8", "--max-completion-length", "20", "--json"))
    assert found["preset"] == "8gb" and found["vram_gib"] == 8 and found["fits"] is True
    assert {"load", "rollout", "score", "forward", "backward", "optimizer"} == found["phases"].keys()
    assert found["peak_gib"] == max(found["phases"].values())
    assert sum(found["categories"].values()) == pytest.approx(found["peak_gib"], abs=0.01)
    assert found["rungs"] == []


def test_plan_without_card_or_preset_is_a_matrix(tmp_path, capsys):
    make_model().config.save_pretrained(tmp_path)
    rows = json.loads(run(capsys, "--model", str(tmp_path), "--memory-plan", "savers", "--json"))
    assert [row["preset"] for row in rows] == [name for name in presets.names() if name != "cpu"]


def test_plan_for_people_names_phases_and_rungs(tmp_path, capsys):
    make_model().config.save_pretrained(tmp_path)
    text = run(capsys, "--model", str(tmp_path), "--preset", "4gb")
    for word in ("fits", "backward", "base weights", "savers taken on top of the preset: none"):
        assert word in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "Qwen2.5-0.5B", "--vram", "-1"], "above 2"),
        (["--model", "Qwen2.5-0.5B", "--preset", "9gb"], "no preset"),
        (["--model", "Qwen2.5-0.5B", "--preset", "cpu"], "no card"),
        (["--model", "Qwen2.5-0.5B", "--vram", "8", "--num-generation", "8"], "num-generations"),
        (["--model", "Qwenn2.5-0.5B", "--vram", "8"], "Qwen2.5-0.5B"),
    ],
)
def test_mistakes_get_a_sentence(arguments, said):
    with pytest.raises(UserError, match=said):
        app(["plan", *arguments], standalone_mode=False)


def test_a_rung_never_changes_what_a_step_is():
    """TRL's way of counting: completions a step follow from per_device_train_batch_size."""
    from lowvram_grpo.plan.paper import paper_config

    recipe = recipe_for(gradient_accumulation_steps=8)
    asked = paper_config(recipe).batch_plan()
    plan = Told().plan(recipe, int(5.2 * GIB))
    planned = paper_config(plan.recipe).batch_plan()
    assert Rung("per_device_train_batch_size", 2) in plan.rungs
    assert planned.completions_per_rollout == asked.completions_per_rollout
    assert planned.updates_per_rollout == asked.updates_per_rollout
    assert planned.micro_batch_size == 2


def test_rungs_that_a_model_has_no_place_for_are_passed_over():
    class Untileable(Told):
        def predict(self, recipe, *, exact=False):
            if setting(recipe, "mlp_tile"):
                raise UserError("mlp_tile is set, but this is a mixture of experts")
            return super().predict(recipe, exact=exact)

    plan = Untileable().plan(recipe_for(), int(4.1 * GIB), advise=False)
    assert plan.rungs and not any(rung.key == "mlp_tile" for rung in plan.rungs)


def test_a_setting_of_ones_own_that_is_in_the_way_is_named():
    class Own(Told):
        def _smaller_model(self, plan):
            return None

    plan = Own().plan(recipe_for(quantization="none"), 6 * GIB)
    assert "--quantization nf4 fits" in plan.advice
