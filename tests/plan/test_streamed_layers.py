"""Plans with decoder layers in host memory: bytes of the device and of the host against a real run, the fewest layers
that fit, what is given back for them, and the issue's targets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lowvram_grpo.cli.app import app
from lowvram_grpo.memory.cards import typical
from lowvram_grpo.memory.ladder import AT_LOAD, Rung, next_rung, saves
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.plan.counting import Blueprint
from lowvram_grpo.plan.paper import ladder_of, setting, with_setting
from lowvram_grpo.plan.planner import GIB, Planner
from lowvram_grpo.plan.prediction import fewest_streamed, predict, with_streamed
from lowvram_grpo.plan.streaming import layers_of
from lowvram_grpo.policy.weight_stream import streamed_indices
from lowvram_grpo.recipe.preset import card_budget
from lowvram_grpo.recipe.resolve import resolve
from tests.conftest import make_model, make_tokenizer
from tests.plan.measured import ledger_of, settings

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SIZES = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "vocab_size": 1024,
    "initializer_range": 0.02,
}  # fmt: skip
STEP = {
    "num_generations": 4, "prompts_per_step": 2, "per_device_train_batch_size": 4, "max_prompt_length": 40,
    "max_completion_length": 24, "optim": "adamw_torch", "workspace_mib": 1, "gradient_checkpointing": True,
    "shared_prefix": "on",
}  # fmt: skip
LENGTHS = {"num_generations": 8, "max_prompt_length": 256, "max_completion_length": 300}


def blueprint(quantization="nf4", device="cpu", **sizes):
    config = make_model(**{**SIZES, **sizes}).config
    return Blueprint(config, quantization, torch.float32, LORA, device, longest_prompt=40)


@pytest.mark.parametrize("quantization,streamed", [("nf4", 2), ("none", "auto")])
def test_device_and_host_are_those_of_a_real_run(tmp_path, quantization, streamed):
    """Within 1 %, apart from each other: by all layers counted, and by two small depths."""
    make_model(**SIZES).save_pretrained(tmp_path / "model")
    args = settings(tmp_path / "run", **STEP, head_dtype="int8", activation_offload=True, weight_offload=streamed)
    prompts = [" ".join("abcdefghij" * 4), " ".join("abcdefghijk" * 3 + "lmnopqr")]
    real = ledger_of(str(tmp_path / "model"), args, make_tokenizer(), prompts, quantization, LORA)
    for exact in (True, False):
        found = predict(blueprint(quantization), args, exact=exact)
        for phase, size in found.phases.items():
            assert size == pytest.approx(real.phases[phase].bytes, rel=0.01), (exact, phase)
        assert found.host.keys() == real.host.keys() >= {"weights"}
        for name, size in found.host.items():
            assert size == pytest.approx(real.host[name], rel=0.01), (exact, name)


def paper(**more):
    return settings("plan", **{**STEP, "head_dtype": "int8", **more})


def test_bytes_are_a_straight_line_in_the_number_of_layers():
    """Resident layers lie on the device in every phase, in 4 bits, and no streamed one does but for two slots."""
    whole = predict(blueprint(num_hidden_layers=12), paper(weight_offload="auto"))
    assert len(whole.layers) == 12 and len({size for size, _ in whole.layers}) == 1
    layer, home = whole.layers[0]
    resident = predict(blueprint(num_hidden_layers=12), paper())
    for count in (1, 5, 11):
        found = predict(blueprint(num_hidden_layers=12), paper(weight_offload=count))
        assert found == with_streamed(whole, count)
        counted = predict(blueprint(num_hidden_layers=12), paper(weight_offload=count), exact=True)
        for phase, size in found.phases.items():
            less = home if count == 1 and "streamed weights" in whole.parts[phase] else 0
            assert size == whole.phases[phase] + (12 - count) * layer - less
            # Of loading, the line knows the end of one layer better than its middle.
            loose = {"rel": 2e-3} if phase != "load" else {"abs": layer}
            assert counted.phases[phase] == pytest.approx(size, **loose), (count, phase)
        assert found.host["weights"] == counted.host["weights"] == count * home
        assert found.parts["backward"]["streamed weights"] == min(2, count) * home
    for phase, size in resident.phases.items():
        loose = {"rel": 5e-3} if phase != "load" else {"abs": 2 * layer}
        assert size == pytest.approx(whole.phases[phase] + 12 * layer - 2 * home, **loose), phase
    assert predict(blueprint(num_hidden_layers=12), paper(weight_offload=99)).phases == whole.phases


def test_page_locked_pieces_are_counted_as_they_are_taken():
    """PyTorch takes powers of two, so neighbouring layers share a piece."""
    plain, locked = (
        predict(replace(blueprint(num_hidden_layers=12), device=device), paper(weight_offload=7))
        for device in ("cpu", "cuda")
    )
    assert plain.host["weights"] <= locked.host["weights"] < 1.5 * plain.host["weights"]


def test_the_fewest_layers_that_fit():
    whole = predict(blueprint(num_hidden_layers=12), paper(weight_offload="auto"))
    layer = whole.layers[0][0]
    assert fewest_streamed(whole, whole.peak - 1) is None
    assert fewest_streamed(whole, whole.peak) == 12
    assert fewest_streamed(whole, whole.peak + 3 * layer + layer // 2) == 9
    assert fewest_streamed(whole, whole.peak + 100 * layer) == 1


def test_it_is_the_last_rung_and_none_of_the_guards():
    for name in ("4gb", "6gb", "8gb", "12gb", "16gb", "24gb"):
        assert ladder_of(name)[-1] == Rung("weight_offload", "auto")
    assert "weight_offload" in AT_LOAD
    assert saves("weight_offload", "auto", "off") and saves("weight_offload", "auto", None)
    assert saves("weight_offload", "auto", 3) and not saves("weight_offload", "auto", "auto")
    assert saves("weight_offload", 4, 3) and not saves("weight_offload", 3, 4)
    settings = {"rollout_batch_size": 1, "per_device_train_batch_size": 1, "workspace_mib": 8, "mlp_tile": 128,
                "activation_offload": True, "optimizer_offload": True, "gradient_checkpointing": True}  # fmt: skip
    assert next_rung("backward", settings, ladder_of("8gb")) is None


TARGETS = {"Qwen3-14B": (8, 6.3), "Qwen3-8B": (6, 4.3), "Qwen3-4B": (4, 2.3)}


@pytest.fixture(scope="module")
def plans():
    found = {}

    def plan(model, **flags):
        key = model, *flags.items()
        if key not in found:
            card, _ = TARGETS[model]
            config, _ = resolve_config(model)
            planner = Planner(config, card=typical(card))
            recipe = resolve({"model": model, "preset": f"{card}gb", **LENGTHS, **flags})
            found[key] = planner, recipe, planner.plan(recipe, card_budget(card), advise=False)
        return found[key]

    return plan


@pytest.mark.parametrize("model", ["Qwen3-14B", *(pytest.param(m, marks=pytest.mark.full) for m in list(TARGETS)[1:])])
def test_the_targets(plans, model):
    planner, _, plan = plans(model)
    card, bound = TARGETS[model]
    assert plan.fits and plan.prediction.peak / GIB <= bound
    # The number is in the recipe, and one layer less does not fit.
    count = setting(plan.recipe, "weight_offload")
    assert isinstance(count, int) and plan.rungs[-1] == Rung("weight_offload", count)
    assert plan.recipe.origin["weight_offload"] == "memory plan"
    less = planner.predict(with_setting(plan.recipe, "weight_offload", count - 1))
    assert less.peak > card_budget(card)
    # A pass over the bus is worth many completions: none of the smallest batches of the ladder is left.
    assert setting(plan.recipe, "rollout_batch_size") >= 16
    assert setting(plan.recipe, "per_device_train_batch_size") >= 4
    assert setting(plan.recipe, "head_dtype") == "int8"
    # And the price is said, in words and numbers.
    price = plan.layers
    assert price.streamed == count and price.bytes == pytest.approx(plan.prediction.host["weights"], rel=0.2)
    assert price.seconds == pytest.approx(price.bytes / typical(card).bus)
    assert price.step > price.resident and price.free > price.rows
    for words in (f"{count} of {price.of} layers", "PCIe 4.0 x8, assumed", "tokens a second", "not measured"):
        assert words in price.words


def test_streaming_asked_for_comes_before_the_ladder(tmp_path):
    """`auto` of a person: off where all fits, else as few layers as the preset's own settings take."""
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    planner = Planner(make_model(**sizes).config, card=typical(8))
    short = {"model": "tiny", "preset": "8gb", "max_prompt_length": 32, "max_completion_length": 32,
             "memory_plan": "savers", "embedding_offload": False}  # fmt: skip
    recipe = resolve({**short, "weight_offload": "auto"})
    roomy = planner.plan(recipe, 20 * GIB)
    assert setting(roomy.recipe, "weight_offload") == "off" and roomy.layers is None
    tight = roomy.prediction.peak - 2**22
    plan = planner.plan(recipe, tight, advise=False)
    count = setting(plan.recipe, "weight_offload")
    assert plan.fits and isinstance(count, int) and plan.layers.streamed == count
    # One layer less does not fit, and nothing grew beyond the preset, as savers asks.
    assert count == 1 or planner.predict(with_setting(plan.recipe, "weight_offload", count - 1)).peak > tight
    assert not plan.climbs
    fixed = planner.plan(resolve({**short, "weight_offload": 3}), tight, advise=False)
    assert setting(fixed.recipe, "weight_offload") == "3" and fixed.layers.streamed == 3
    none = resolve({**short, "weight_offload": "off"})
    assert setting(planner.plan(none, tight, advise=False).recipe, "weight_offload") == "off"


def test_more_completions_cost_nothing_until_products_take_as_long():
    config, _ = resolve_config("Qwen3-14B")
    step = {"model": "Qwen3-14B", "preset": "8gb", **LENGTHS, "prompts_per_step": 64}
    price = lambda **given: layers_of(resolve({**step, "weight_offload": 20, **given}), config, typical(8), "bfloat16")
    few, many, too_many = (price(rollout_batch_size=n) for n in (4, 32, 512))
    assert many.tokens == pytest.approx(8 * few.tokens) and few.free == many.free
    assert too_many.rows > too_many.free and too_many.tokens < 16 * many.tokens
    assert price(weight_offload=10).bytes == pytest.approx(few.bytes / 2)
    assert price(weight_offload="off") is None


def test_layers_are_spread_evenly():
    assert streamed_indices(4, 2) == [1, 3] and streamed_indices(4, 9) == [0, 1, 2, 3]


def test_the_command_shows_price_and_host_memory(capsys):
    flags = "plan -m Qwen2.5-3B --vram 8 --weight-offload 30 --memory-plan savers --max-prompt-length 64"
    app([*flags.split(), "--max-completion-length", "64"], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "30 of 36 layers wait in host memory" in said and "host memory:" in said and "weights 1." in said
    app([*flags.split(), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["streamed_layers"]["layers"] == 30 and found["streamed_layers"]["completions_worth_while"] > 0
    assert found["host_gib"]["total"] >= found["host_gib"]["weights"] > 0.9
    assert found["settings"]["weight_offload"] == "30"
