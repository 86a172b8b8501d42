"""Preset files: what may stand in them, and which one a card gets."""

from __future__ import annotations

import itertools

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory import devices
from lowvram_grpo.memory.ladder import saves
from lowvram_grpo.recipe import preset
from lowvram_grpo.recipe.resolve import resolve


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for gib in (4, 8, 24):
        write(tmp_path, f"{gib}gb", f"vram_gib = {gib}.0")
    write(tmp_path, "cpu", "")
    monkeypatch.setattr(preset, "_folder", lambda: tmp_path)
    return tmp_path


def write(folder, name, extra, settings="learning_rate = 1e-5"):
    text = f'summary = "a card"\n{extra}\n[settings]\n{settings}\n'
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def test_cards_come_by_size_and_the_cpu_last(folder):
    assert preset.names() == ["4gb", "8gb", "24gb", "cpu"]
    assert preset.load("8gb") == preset.Preset("8gb", "a card", 8.0, {"learning_rate": 1e-5})


# An 8 GB card tells of a little less than 8 GiB; one below the smallest preset still gets a card's preset.
@pytest.mark.parametrize("gib,name", [(2, "4gb"), (4, "4gb"), (7.8, "8gb"), (16, "8gb"), (24, "24gb"), (80, "24gb")])
def test_the_largest_that_fits_is_picked(folder, monkeypatch, gib, name):
    size = int(gib * 2**30)
    card = devices.Device("cuda", "card", 0, size, size, (8, 6), True)
    monkeypatch.setattr(devices, "detect", lambda: card)
    assert preset.pick() == name


@pytest.mark.parametrize(
    "extra,settings,words",
    [
        ("", "lerning_rate = 1e-5", "in preset odd .did you mean 'learning_rate'"),
        ("vram = 8.0", "beta = 0.0", "unknown key 'vram'"),
        ("", "num_generations = 'many'", "num_generations"),
    ],
)
def test_a_wrong_preset_is_named(folder, extra, settings, words):
    write(folder, "odd", extra, settings)
    with pytest.raises(UserError, match=words):
        resolve({"preset": "odd"})


def test_a_preset_that_is_not_there(folder):
    with pytest.raises(UserError, match=r"did you mean '24gb'.*cpu"):
        preset.load("24g")


def test_a_preset_extends_another_and_leaves_out_the_rungs_that_it_has_passed(folder):
    basis = 'ladder = ["mlp_tile=512", "per_device_train_batch_size=2", "head_dtype=nf4", "mlp_tile=256"]'
    write(folder, "basis", basis, "learning_rate = 1e-5\nper_device_train_batch_size = 4")
    write(folder, "child", 'extends = "basis"', "per_device_train_batch_size = 2\nmlp_tile = 512")
    child = preset.load("child")
    assert child.settings == {"learning_rate": 1e-5, "per_device_train_batch_size": 2, "mlp_tile": 512}
    assert child.ladder == (("head_dtype", "nf4"), ("mlp_tile", "256"))
    write(folder, "own", 'extends = "basis"\nladder = ["mlp_tile=64"]')
    assert preset.load("own").ladder == (("mlp_tile", "64"),)
    write(folder, "grandchild", 'extends = "child"')
    with pytest.raises(UserError, match="extends another"):
        preset.load("grandchild")


@pytest.mark.parametrize("rung", ["mlp_tile", "=512", "mlp_tile=", "mlp_tile=few", "head_dtype=int3"])
def test_a_malformed_rung_is_named(folder, rung):
    write(folder, "odd", f'ladder = ["mlp_tile=1024", "{rung}"]')
    with pytest.raises(UserError, match="rung"):
        preset.load("odd")


@pytest.mark.parametrize("gib,name", [(3, "4gb"), (6, "6gb"), (7.99, "8gb"), (8, "8gb"), (11, "8gb"), (80, "24gb")])
def test_a_card_can_be_named_by_its_size(gib, name):
    assert preset.pick_for_gib(gib) == name


def test_presets_change_how_a_step_is_computed_and_not_what():
    """Only the CPU has a step of its own."""
    maths = ("learning_rate", "prompts_per_step", "optim")
    cards = [preset.load(name) for name in preset.names() if name != "cpu"]
    assert len({tuple(card.settings[key] for key in maths) for card in cards}) == 1
    assert [card.vram_gib for card in cards] == [4, 6, 8, 12, 16, 24]


@pytest.mark.parametrize("name", preset.names())
def test_every_rung_resolves_and_saves_something(name):
    """A recipe takes each rung as a flag, and each takes less than what stands there when its turn comes."""
    loaded = preset.load(name)
    assert bool(loaded.ladder) is (name != "cpu")
    state = resolve({"preset": name})
    values = {"quantization": state.quantization, **state.training}
    for key, value in loaded.ladder:
        taken = resolve({"preset": name, key: value})
        new = {"quantization": taken.quantization, **taken.training}[key]
        assert saves(key, new, values.get(key)), (key, value)
        values[key] = new


def test_a_larger_card_begins_higher_on_the_same_ladder():
    ladders = [preset.load(name).ladder for name in ("24gb", "16gb", "12gb", "8gb", "6gb", "4gb")]
    for larger, smaller in itertools.pairwise(ladders):
        assert larger[-len(smaller) :] == smaller or set(smaller) < set(larger)
    keys = [key for key, _ in preset.load("24gb").ladder]
    assert keys.index("per_device_train_batch_size") < keys.index("quantization")
    assert preset.load("8gb").ladder[0] == ("rollout_batch_size", "16")
