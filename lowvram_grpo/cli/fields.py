"""`lowvram-grpo train --help-all`: every field of GRPOConfig as a flag, read from the dataclass itself."""

from __future__ import annotations

import re
import shutil
import textwrap
import typing
from dataclasses import MISSING, Field, fields
from typing import Any

from lowvram_grpo.run.quiet import hush

_INTRO = (
    "Every field of GRPOConfig, and every parameter of a built-in reward, is a flag of `lowvram-grpo train` (--no-NAME "
    "switches one off) and a key of a recipe file. Defaults in brackets; a preset may set others "
    "(`lowvram-grpo presets NAME`)."
)


def show() -> None:
    """Print the flags in four groups: GRPO's, parameters of built-in rewards, those of
    transformers.TrainingArguments, and those without effect."""
    hush()
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.recipe.notices import why_inert
    from lowvram_grpo.recipe.resolve import job_types, training_types
    from lowvram_grpo.rewards.settings import RewardSettings

    types = training_types()
    rewards = {_title(field, job_types()[field.name]): field.metadata["help"] for field in fields(RewardSettings)}
    grpo: dict[str, str] = {}
    inherited: dict[str, str] = {}
    inert: dict[str, str] = {}
    for field in fields(GRPOConfig):
        text, reason = field.metadata.get("help", ""), why_inert(field.name)
        if field.name not in types:
            continue
        title = _title(field, types[field.name])
        if reason:
            inert[title] = f"{reason}."
        elif field.name in GRPOConfig.__annotations__:
            grpo[title] = text
        else:
            inherited[title] = first_sentence(text)
    width = max(shutil.get_terminal_size().columns, 40)
    print(textwrap.fill(_INTRO, width))
    for heading, group in (
        ("GRPO", grpo),
        ("Parameters of built-in rewards", rewards),
        ("transformers.TrainingArguments", inherited),
        ("Accepted for TRL's sake, without effect", inert),
    ):
        print(f"\n{heading}\n")
        for title, text in group.items():
            print(f"  {title}")
            print(textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


def _title(field: Field, hint: Any) -> str:
    """`--learning-rate FLOAT [1e-06]`."""
    kind = type_name(hint)
    return f"--{field.name.replace('_', '-')}{'' if kind == 'bool' else ' ' + kind.upper()} [{_default(field)}]"


def type_name(hint: Any) -> str:
    """What to write after the flag: `int`, `text|bool`, `json` for a table. An enum is text; None goes unsaid."""
    options = typing.get_args(hint) if typing.get_origin(hint) is not list else ()
    kinds = [typing.get_origin(option) or option for option in options or (hint,)]
    known = {bool: "bool", int: "int", float: "float", str: "text", list: "list", dict: "json"}
    names = [known[kind] for kind in kinds if kind in known]
    if "list" in names or "json" in names:
        names = [name for name in names if name != "text"]  # how either is written on a command line
    return "|".join(names) or "text"


def first_sentence(text: str) -> str:
    """Up to the full stop that a capital follows; argparse's %% is a %."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`(])", " ".join(text.split()), maxsplit=1)[0].replace("%%", "%")


def _default(field: Field) -> str:
    from lowvram_grpo.recipe.resolve import JOB_DEFAULTS

    value = field.default_factory() if field.default_factory is not MISSING else field.default
    value = JOB_DEFAULTS.get(field.name, value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return "unset" if value in (None, "", [], {}) else str(getattr(value, "value", value))
