"""`lowvram-grpo train --help-all`: every field of GRPOConfig as a flag, read from the dataclass itself."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

from lowvram_grpo.errors import flag_of
from lowvram_grpo.run.quiet import hush

if TYPE_CHECKING:
    from lowvram_grpo.recipe.field_table import Entry

_INTRO = (
    "Every field of GRPOConfig, and every parameter of a built-in reward, is a flag of `lowvram-grpo train` (--no-NAME "
    "switches one off) and a key of a recipe file. Defaults in brackets; a preset may set others "
    "(`lowvram-grpo presets NAME`)."
)
_INERT = "Accepted for TRL's sake, without effect"
_REFUSED = "Refused"


def show() -> None:
    """Print the flags in groups: GRPO's by subject, parameters of built-in rewards, those of
    transformers.TrainingArguments, those without effect, and those that are refused."""
    hush()
    from lowvram_grpo.recipe.field_table import INHERITED, REWARDS, entries, reward_entries

    known = [*entries(), *reward_entries()]
    groups: dict[str, list[Entry]] = {each.group: [] for each in known if each.group not in (REWARDS, INHERITED)}
    groups |= {REWARDS: [], INHERITED: [], _INERT: [], _REFUSED: []}
    for each in known:
        groups[_REFUSED if each.refused else _INERT if each.inert else each.group].append(each)
    width = max(shutil.get_terminal_size().columns, 40)
    print(textwrap.fill(_INTRO, width))
    for heading, group in groups.items():
        print(f"\n{heading}\n")
        for each in group:
            print(f"  {_title(each)}")
            why = each.refused or each.inert
            text = f"{why}." if why else f"{'(ours) ' if each.ours else ''}{each.text}"
            print(textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


def _title(entry: Entry) -> str:
    """`--learning-rate FLOAT [1e-06]`."""
    from lowvram_grpo.recipe.field_table import value_text
    from lowvram_grpo.recipe.resolve import JOB_DEFAULTS

    default = value_text(JOB_DEFAULTS[entry.name]) if entry.name in JOB_DEFAULTS else entry.default
    return f"{flag_of(entry.name)}{'' if entry.kind == 'bool' else ' ' + entry.kind.upper()} [{default}]"
