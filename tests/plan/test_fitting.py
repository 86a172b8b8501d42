"""From a card, which is not there, to settings that fit it."""

from __future__ import annotations

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.devices import Device
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.plan.fitting import fit
from lowvram_grpo.recipe.resolve import resolve

GIB = 2**30


def card(total: float, free: float, capability=(8, 9), system="linux", **given) -> Device:
    bf16 = capability[0] >= 8
    return Device("cuda", "a card", 0, int(total * GIB), int(free * GIB), capability, bf16, system, **given)


def fitted(device, model="Qwen2.5-1.5B", **flags):
    said = []
    recipe = resolve({"model": model, "preset": "8gb", "max_prompt_length": 256, "max_completion_length": 300, **flags})
    config, _ = resolve_config(model)
    return fit(recipe, config, device, said.append, cold_start=False, longest_prompt=200), " ".join(said)


def test_a_roomy_card_is_used():
    recipe, said = fitted(card(8, 7.4))
    assert "memory plan" in said and "are ours" in said
    raised = [key for key, origin in recipe.origin.items() if origin == "memory plan"]
    assert "per_device_train_batch_size" in raised and recipe.quantization == "none"
    assert "climbed: " in said and "a 16-bit base" in said and "--memory-plan savers" in said
    assert "other numbers than on the preset's" in said and "recipe.toml" in said


def test_a_preset_can_be_kept_as_it_is():
    recipe, said = fitted(card(8, 7.4), memory_plan="savers")
    assert "memory plan: a peak of" in said and "climbed" not in said
    assert "memory plan" not in recipe.origin.values()


def test_a_small_card_takes_rungs_and_says_which():
    recipe, said = fitted(card(2, 1.5))
    taken = [key for key, origin in recipe.origin.items() if origin == "memory plan"]
    assert taken and all(key in said for key in taken)


@pytest.mark.parametrize(
    "system,total,free,said",
    [
        ("linux", 16, 2.5, r"in host memory, of which 2\.5 GiB are free"),
        ("windows", 2, 6, "page-locked host memory, of which Windows grants half of its 2 GiB"),
    ],
)
def test_streamed_layers_need_host_memory(monkeypatch, system, total, free, said):
    """Refused before anything is loaded, with what would help."""
    from lowvram_grpo.memory import ram

    lockable = None if system == "linux" else total * GIB // 2
    monkeypatch.setattr(
        "lowvram_grpo.plan.fitting.host_of", lambda name: ram.Host(int(total * GIB), int(free * GIB), lockable, name)
    )
    device = card(8, 7.4, system=system, nvml_free_bytes=int(7.4 * GIB))
    flags = {"weight_offload": 36, "memory_plan": "savers"}
    with pytest.raises(UserError, match=said + r".*weight_offload.*--memory-plan off"):
        fitted(device, model="Qwen2.5-3B", **flags)
    monkeypatch.setattr("lowvram_grpo.plan.fitting.host_of", lambda name: ram.Host(32 * GIB, 16 * GIB, None, name))
    recipe, heard = fitted(device, model="Qwen2.5-3B", **flags)
    assert recipe.training["weight_offload"] == "36"
    assert "host memory: " in heard and "36 of 36 layers wait in host memory" in heard


@pytest.mark.full  # 30 predictions; test_planner.py has advice of fewer
def test_a_card_that_cannot_hold_it_gets_advice():
    with pytest.raises(UserError, match=r"does not fit.*What would:.*Qwen2.5-0.5B fits.*GiB free.*memory-plan off"):
        fitted(card(2, 0.9))


def test_it_can_be_switched_off():
    recipe, _ = fitted(card(2, 1.2), memory_plan="off")
    assert "memory plan" not in recipe.origin.values()


def test_a_cap_counts_as_the_card():
    _, said = fitted(card(24, 23), vram_gib=3)
    assert "3.0 GiB are ours (vram_gib is 3)" in said


def test_a_model_that_cannot_be_planned_is_trained_all_the_same(monkeypatch):
    from lowvram_grpo.plan import planner

    def broken(*args, **kwargs):
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(planner.Planner, "predict", broken)
    recipe, said = fitted(card(8, 7.4))
    assert "no memory plan: NotImplementedError" in said and recipe.quantization == "nf4"


def test_a_cpu_is_not_planned():
    _, said = fitted(Device("cpu", "CPU", 0, 8 * GIB, 8 * GIB, None, False))
    assert not said


def test_weights_that_are_not_counted_are_trained_unplanned():
    recipe, said = fitted(card(8, 7.4), quantization="int8")
    assert "no memory plan: weights in int8 are not counted" in said and recipe.quantization == "int8"
