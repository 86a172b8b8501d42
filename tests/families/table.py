"""docs/models.md, whose cells are computed (a minute of CPU time):

python -m tests.families.table > docs/models.md
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

from lowvram_grpo.policy.text_model import language_model
from tests.families.cells import CELLS, YES, targets
from tests.families.zoo import FAMILIES, Family, config_of, whole_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
#: Whose code decides what is in the cells.
LIBRARIES = ("transformers", "peft", "gguf")
_PROSE = Path(__file__).with_name("models.md.in")


def row(family: Family, only: tuple[str, ...] = tuple(CELLS)) -> dict[str, str]:
    """Cells by column, computed now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {column: CELLS[column](family) for column in only}


def page() -> str:
    """All of docs/models.md."""
    text = _PROSE.read_text(encoding="utf-8")
    notes: list[str] = []
    parts = {
        "VERSIONS": versions(),
        "TABLE": _table(("family", *CELLS), [_line(family, row(family), notes) for family in FAMILIES]),
        "MEMBERS": _table(("family", "models"), [(f.name, _members(f)) for f in FAMILIES]),
        "TARGETS": _table(("family", "trained", "left out"), [_targets_line(family) for family in FAMILIES]),
        "WHOLE": _table(("family", "published as", "loaded as", "an adapter is saved as of"), _whole_lines()),
    }
    parts["NOTES"] = "\n".join(f"{i}. {note}." for i, note in enumerate(notes, 1))
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def _line(family: Family, cells: dict[str, str], notes: list[str]) -> tuple[str, ...]:
    return (family.name, *(_short(cell, notes) for cell in cells.values()))


def _short(cell: str, notes: list[str]) -> str:
    """`yes` or `no`, and the number of a note that says the rest."""
    said, _, rest = cell.partition(", but ") if cell.startswith(YES) else cell.partition(": ")
    if not rest:
        return said
    if rest not in notes:
        notes.append(rest)
    return f"{said} [{notes.index(rest) + 1}]"


def cells_of(page: str) -> dict[str, dict[str, str]]:
    """What a page says: family -> column -> cell, as `row` gives it."""
    notes = dict(re.findall(r"^(\d+)\. (.*)\.$", page, re.M))
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(lines) if line[:2] == ["family", next(iter(CELLS))])
    found = {}
    for line in lines[start + 2 : start + 2 + len(FAMILIES)]:  # behind the rule
        found[line[0]] = {column: _long(cell, notes) for column, cell in zip(CELLS, line[1:])}
    return found


def _long(cell: str, notes: dict[str, str]) -> str:
    said, _, number = cell.partition(" [")
    if not number:
        return said
    return f"{said}, but {notes[number[:-1]]}" if said == YES else f"{said}: {notes[number[:-1]]}"


def _members(family: Family) -> str:
    return ", ".join(f"`{name}`" for name in family.members)


def _targets_line(family: Family) -> tuple[str, str, str]:
    trained, left = targets(family)
    code = lambda names: ", ".join(f"`{name}`" for name in _together(names))
    why = {reason: [name for name, found in left.items() if found == reason] for reason in left.values()}
    return family.name, code(trained), "; ".join(f"{code(names)} ({reason})" for reason, names in why.items()) or "-"


def _together(names: list[str]) -> list[str]:
    """`self_attn.{k,q}_proj` for names that differ in one word."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = re.fullmatch(r"(.*\.)?([^._]+)(_proj)", name)
        groups.setdefault((found[1] or "", found[3]) if found else (name, ""), []).append(found[2] if found else "")
    return [f"{a}{{{','.join(w)}}}{b}" if len(w) > 1 else f"{a}{w[0]}{b}" for (a, b), w in groups.items()]


def _whole_lines() -> list[tuple[str, str, str, str]]:
    lines = []
    for family in FAMILIES:
        if family.whole is None:
            continue
        config, mapping = whole_config(family, config_of(family)), transformers.AutoModelForCausalLM._model_mapping
        alone, theirs = mapping[type(language_model(config))], mapping.get(type(config), None)
        published = f"{family.whole}ForConditionalGeneration"
        saved = alone.__name__ if theirs is alone else published
        lines.append((family.name, f"`{published}`", f"`{alone.__name__}`", f"`{saved}`"))
    return lines


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


def main() -> None:
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        text = page()
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
