"""Preset files: what may stand in them, and which one a card gets."""

from __future__ import annotations

import pytest

from lowvram_grpo import preset
from lowvram_grpo.errors import UserError
from lowvram_grpo.memory import devices
from lowvram_grpo.recipe import resolve


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
