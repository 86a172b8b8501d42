"""Presets: where a size of card begins, and what it gives up step by step when memory runs short.

`presets/*.toml` hold a summary, the size of card, settings to start from, and a ladder: one setting a rung, the
cheapest in speed first. They change how a step is computed, not what it computes. `extends` takes another preset's
settings and ladder as a basis; of a ladder, the rungs that the settings have passed already are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.memory.ladder import saves
from lowvram_grpo.recipe.tables import parse_toml

if TYPE_CHECKING:
    from lowvram_grpo.memory.budget import Budget
    from lowvram_grpo.memory.devices import Device

_KEYS = {"summary", "vram_gib", "extends", "settings", "ladder"}
_GIB = 2**30
# What of a card is not ours on a working day, in GiB and as a share of a large one: desktop, driver and reserve. An 8
# GB card keeps its preset with 6.5 GiB free on Windows, and an empty 6 GB card on Linux does not reach it.
_NOT_OURS, _NOT_OURS_SHARE = 2.1, 0.1
# What a Windows desktop and its reserve take of a card, in GiB.
_DESKTOP = 1.7


@dataclass(frozen=True)
class Preset:
    """`settings` are keys of a recipe; `vram_gib` is the size of card it is meant for, None for a CPU; `ladder` holds
    (key, value as text) in the order in which they save memory."""

    name: str
    summary: str
    vram_gib: float | None
    settings: dict[str, Any]
    ladder: tuple[tuple[str, str], ...] = ()

    @property
    def working_bytes(self) -> int:
        """The budget that this preset is meant to work in: its card less what is not ours there."""
        vram = self.vram_gib or 0
        return int((vram - max(_NOT_OURS, _NOT_OURS_SHARE * vram)) * _GIB)


@dataclass(frozen=True)
class Pick:
    """A preset that was taken for a device, why (a phrase), and sentences for people."""

    name: str
    reason: str
    notices: tuple[str, ...] = ()


def names() -> list[str]:
    """All presets, the smallest card first and the CPU last."""
    found = [load(entry.name[: -len(".toml")]) for entry in _folder().iterdir() if entry.name.endswith(".toml")]
    return [preset.name for preset in sorted(found, key=lambda p: (p.vram_gib is None, p.vram_gib or 0))]


def load(name: str) -> Preset:
    """The preset called `name`; its settings are checked when a recipe takes them up.

    Raises:
        UserError: there is none (lists those there are), or the file has an unknown key or a malformed rung.
    """
    table = _table(name)
    settings, ladder = table.get("settings", {}), table.get("ladder")
    if "extends" in table:
        basis = _table(table["extends"])
        if "extends" in basis:
            raise UserError(f"Preset {name} extends {table['extends']}, which extends another; name that one instead.")
        settings = {**basis.get("settings", {}), **settings}
        ladder = basis.get("ladder") if ladder is None else ladder
    rungs = _remaining(settings, [_rung(name, text) for text in ladder or []])
    return Preset(name, table["summary"], table.get("vram_gib"), settings, rungs)


def pick(device: Device | None = None, budget: Budget | None = None) -> str:
    """The preset for a device: the largest whose working budget fits; those of the device that is there, when unset."""
    return choose(device, budget).name


def choose(device: Device | None = None, budget: Budget | None = None) -> Pick:
    """`pick`, with its reason. A card counts by what of it is ours now, not by its size."""
    from lowvram_grpo.memory import budget as budgets
    from lowvram_grpo.memory import devices

    device = devices.detect() if device is None else device
    if device.kind == "cpu":
        return Pick("cpu", "there is no CUDA device")
    ours = (budgets.budget(device) if budget is None else budget).usable_bytes
    cards = _cards()
    fitting = [preset for preset in cards if preset.working_bytes <= ours]
    size = budgets.gib(ours)
    if fitting:
        return Pick(fitting[-1].name, f"{size} are ours, and it works in {budgets.gib(fitting[-1].working_bytes)}")
    smallest = cards[0]
    notice = (
        f"Only {size} of {device.name} are ours, less than the smallest preset, {smallest.name}, is meant for; free "
        "some of it, or train a smaller model."
    )
    return Pick(smallest.name, f"{size} are ours, and it is the smallest", (notice,))


def pick_for_gib(gib: float) -> str:
    """The preset for a card that is sold with `gib` of memory: the largest that is meant for no more, else the
    smallest. For planning; a budget of so many bytes is `pick`'s."""
    cards = _cards()
    # 7.99 is an 8 GB card.
    fitting = [preset for preset in cards if preset.vram_gib is not None and preset.vram_gib <= gib * 1.05]
    return (fitting[-1] if fitting else cards[0]).name


def card_budget(gib: float) -> int:
    """Bytes that a card sold with `gib` leaves for a run on a Windows desktop: 6.3 of 8 (headless Linux leaves 7.2).

    What is planned for it runs on every such card. `memory.budget` knows better where the card is there to be asked.
    """
    return int((gib - max(_DESKTOP, _NOT_OURS_SHARE * gib)) * _GIB)


def card_for(size: int) -> float:
    """The size of card, in GB as cards are sold, whose `card_budget` is `size` bytes."""
    gib = size / _GIB
    return math.ceil(max(gib + _DESKTOP, gib / (1 - _NOT_OURS_SHARE)))


def _cards() -> list[Preset]:
    """The presets of cards, the smallest first."""
    return [preset for preset in map(load, names()) if preset.vram_gib is not None]


def _table(name: str) -> dict[str, Any]:
    file = _folder() / f"{name}.toml"
    if not file.is_file():
        known = sorted(entry.name[:-5] for entry in _folder().iterdir() if entry.name.endswith(".toml"))
        raise UserError(f"There is no preset {name!r}{did_you_mean(name, known)}; presets: auto, {', '.join(known)}.")
    table = parse_toml(file.read_text(encoding="utf-8"))
    if unknown := table.keys() - _KEYS:
        raise UserError(f"Preset {name} has an unknown key {sorted(unknown)[0]!r}.")
    return table


def _rung(name: str, text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip() or not value.strip():
        raise UserError(f"Preset {name} has a rung {text!r}; a rung is one setting, as in 'mlp_tile=512'.")
    return key.strip(), value.strip()


def _remaining(settings: Mapping[str, Any], ladder: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The rungs that still save something, taken one after the other from `settings`."""
    state, left = dict(settings), []
    for key, value in ladder:
        if saves(key, value, state.get(key)):
            state[key] = value
            left.append((key, value))
    return tuple(left)


def _folder():
    return files("lowvram_grpo.presets")
