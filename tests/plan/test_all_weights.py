"""Plans of training all weights: `--use-peft false`."""

from __future__ import annotations

import pytest

from lowvram_grpo.cli.app import app
from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.cards import typical
from lowvram_grpo.memory.ladder import Rung
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.plan.paper import ladder_on_paper, setting, trains_all_weights, with_setting
from lowvram_grpo.plan.planner import GIB, Planner
from lowvram_grpo.plan.streaming import streaming_of
from lowvram_grpo.recipe.preset import card_budget
from lowvram_grpo.recipe.resolve import resolve

LENGTHS = {"num_generations": 8, "max_prompt_length": 128, "max_completion_length": 128}


def recipe_for(model: str = "Qwen2.5-0.5B", **flags):
    return resolve({"model": model, "preset": "8gb", "use_peft": False, **LENGTHS, **flags})


def test_the_planner_streams_the_reference_where_it_must():
    config, _ = resolve_config("Qwen2.5-0.5B")
    planner = Planner(config, card=typical(8))
    plan = planner.plan(recipe_for(), card_budget(8), advise=False)
    assert plan.fits and plan.rungs[0] == Rung("reference_offload", True)
    assert setting(plan.recipe, "quantization") == "none" and setting(plan.recipe, "head_dtype") == "dense"
    weights = 4 * 494_032_768
    resident = planner.predict(recipe_for())
    assert resident.parts["backward"]["reference"] == pytest.approx(weights, rel=1e-3)
    assert resident.parts["backward"]["gradients"] == pytest.approx(weights, rel=1e-3)
    assert resident.peak > card_budget(8)
    # Two layers of it, where it is scored; elsewhere the last norm.
    layer = 4 * (494_032_768 - 151_936 * 896 - 896) / 24
    assert plan.prediction.parts["score"]["reference"] == pytest.approx(2 * layer, rel=2e-3)
    assert plan.prediction.parts["backward"]["reference"] < 2**14
    streamed = planner.predict(with_setting(recipe_for(), "reference_offload", True))
    assert resident.phases["backward"] - streamed.phases["backward"] == pytest.approx(weights, rel=2e-3)
    # What that costs is said, as predicted.
    assert plan.streaming.bytes == pytest.approx(weights, rel=2e-3)
    assert "predicted" in plan.streaming.words and "not measured" in plan.streaming.words
    assert plan.as_json()["streaming"]["gib"] == pytest.approx(weights / GIB, abs=2e-3)


def test_where_there_is_room_it_stays_on_the_card():
    config, _ = resolve_config("SmolLM2-135M")
    plan = Planner(config, card=typical(8)).plan(recipe_for("SmolLM2-135M"), card_budget(8), advise=False)
    assert plan.fits and not plan.rungs and plan.streaming is None
    assert plan.prediction.parts["backward"]["reference"] == pytest.approx(4 * 134_515_008, rel=1e-3)
    # A base that is trained is neither rounded nor moved, however much a climb or a rung would win.
    assert not {climb.rung.key for climb in plan.climbs} & {"quantization", "head_dtype", "embedding_offload"}


def test_its_ladder():
    rungs = [rung.key for rung in ladder_on_paper(recipe_for())]
    assert rungs[0] == "reference_offload" and rungs[-1] == "optimizer_offload" and "rollout_batch_size" in rungs
    assert not {"quantization", "head_dtype", "embedding_offload"} & set(rungs)
    assert "reference_offload" not in [rung.key for rung in ladder_on_paper(recipe_for(beta=0.0))]
    assert "reference_offload" not in [rung.key for rung in ladder_on_paper(recipe_for(reference_offload=False))]
    adapter = resolve({"model": "Qwen2.5-0.5B", "preset": "8gb"})
    assert not trains_all_weights(adapter)
    assert not {"reference_offload", "optimizer_offload"} & {rung.key for rung in ladder_on_paper(adapter)}


@pytest.mark.parametrize(
    "flags,said",
    [
        ({"quantization": "nf4"}, "quantization nf4 needs a frozen base"),
        ({"head_dtype": "int8"}, "head_dtype int8 needs a frozen base"),
        ({"embedding_offload": True}, "embedding_offload True needs a frozen base"),
        ({"adapter": "somewhere"}, "--adapter and --use-peft false"),
    ],
)
def test_what_only_a_frozen_base_can_be_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        recipe_for(**flags)
    assert recipe_for(quantization="none").quantization == "none"


def test_streaming_takes_the_bus_for_what_products_do_not_hide():
    config, _ = resolve_config("Qwen2.5-0.5B")
    cost = lambda **given: streaming_of(recipe_for(reference_offload=True, **given), config, typical(8), "bfloat16")
    few, many = cost(per_device_train_batch_size=1), cost(per_device_train_batch_size=16)
    assert few.passes == 32 and many.passes == 2 and few.bytes == many.bytes
    # Nothing hides more than there is, and lm_head is not hidden.
    table = 4 * 151_936 * 896 / typical(8).bus
    for each in (few, many):
        assert each.passes * table <= each.seconds <= each.passes * each.bytes / typical(8).bus
    assert few.seconds > many.seconds
    # A rollout is scored once, however many steps it serves.
    assert cost(num_iterations=2, per_device_train_batch_size=16).passes == many.passes / 2
    assert cost(beta=0.0) is None


def test_the_command_says_it(capsys):
    flags = "plan -m SmolLM2-135M --vram 8 --use-peft false --reference-offload true --memory-plan savers"
    app(flags.split(), standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "go over the bus in each of 8 passes a step; predicted to take" in said and "not measured" in said
