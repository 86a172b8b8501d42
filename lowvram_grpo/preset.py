"""Presets: a starting point for a size of card, read from presets/*.toml."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.tables import parse_toml


@dataclass(frozen=True)
class Preset:
    """`settings` are keys of a recipe; `vram_gib` is the size of card it is meant for, None for a CPU."""

    name: str
    summary: str
    vram_gib: float | None
    settings: dict[str, Any]


def names() -> list[str]:
    """All presets, the smallest card first and the CPU last."""
    found = [load(entry.name[: -len(".toml")]) for entry in _folder().iterdir() if entry.name.endswith(".toml")]
    return [preset.name for preset in sorted(found, key=lambda p: (p.vram_gib is None, p.vram_gib or 0))]


def load(name: str) -> Preset:
    """The preset called `name`; its settings are checked when a recipe takes them up.

    Raises:
        UserError: there is none (lists those there are), or the file has an unknown key.
    """
    file = _folder() / f"{name}.toml"
    if not file.is_file():
        known = sorted(entry.name[:-5] for entry in _folder().iterdir() if entry.name.endswith(".toml"))
        raise UserError(f"There is no preset {name!r}{did_you_mean(name, known)}; presets: auto, {', '.join(known)}.")
    table = parse_toml(file.read_text(encoding="utf-8"))
    if unknown := table.keys() - {"summary", "vram_gib", "settings"}:
        raise UserError(f"Preset {name} has an unknown key {sorted(unknown)[0]!r}.")
    return Preset(name, table["summary"], table.get("vram_gib"), table.get("settings", {}))


def pick() -> str:
    """The preset for the device that is there: the largest whose card is no larger than this one."""
    from lowvram_grpo.memory.devices import detect

    device = detect()
    if device.kind == "cpu":
        return "cpu"
    cards = [load(name) for name in names() if load(name).vram_gib is not None]
    fitting = [preset for preset in cards if preset.vram_gib * 2**30 <= device.total_bytes * 1.05]
    return (fitting[-1] if fitting else cards[0]).name


def _folder():
    return files("lowvram_grpo.presets")
