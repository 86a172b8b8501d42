"""Flags without an option of their own: every setting of a recipe is one, for every command that takes a recipe."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from lowvram_grpo.errors import UserError

# For a command with such flags; they come as its context's arguments.
MORE_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
OutputDir = Annotated[
    Path | None, typer.Option("--output-dir", "-o", help="Run directory; default runs/<model>-<data>-<time>.")
]


def parse_extra(arguments: list[str]) -> dict[str, Any]:
    """Settings without an option of their own (GRPOConfig fields, TRL's names, job keys with underscores) from
    `--learning-rate 1e-5`, `--learning_rate=1e-5`, `--bf16` and `--no-bf16`. A setting that is a list takes all values
    behind its flag, and those of the same flag again; any other the last.

    Raises:
        UserError: an argument that is no flag, an unknown flag, or a flag without its value.
    """
    from lowvram_grpo.recipe.not_applied import NEVER
    from lowvram_grpo.recipe.resolve import ALIASES, IGNORED, LOADING, REWARD_MODEL, job_types, training_types
    from lowvram_grpo.recipe.unknown_names import instead_of

    types = {**training_types(), **job_types(), **dict.fromkeys(LOADING, bool)}
    elsewhere = {*ALIASES, *IGNORED, *NEVER, REWARD_MODEL}
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        raw = rest.pop(0)
        if not raw.startswith("--"):
            raise UserError(f"Unexpected argument {raw!r}; settings are flags, as in --learning-rate 1e-5.")
        name, has_value, value = raw[2:].partition("=")
        key = name.replace("-", "_")
        if not has_value and key.startswith("no_") and key not in types and key[3:] in types:
            key, value = key[3:], "false"
        elif key not in types and key not in elsewhere:
            raise UserError(f"Unknown flag {raw.partition('=')[0]}{instead_of(key, types, flag=True)}.")
        elif not has_value:
            listed = _is_list(types.get(ALIASES.get(key, key)))
            values = _taken(rest, every=listed or key in NEVER)
            if values:
                value = values if len(values) > 1 else values[0]
            elif _is_bool(types.get(ALIASES.get(key, key))) or key in NEVER:
                value = "true"
            else:
                raise UserError(f"--{name} needs a value.")
        if key in found and _is_list(types.get(ALIASES.get(key, key))):
            found[key] = [*_as_list(found[key]), *_as_list(value)]
        else:
            found[key] = value
    return found


def _taken(rest: list[str], *, every: bool) -> list[str]:
    """The values at the beginning of `rest`, which loses them: one, or for a list every one before the next flag, as
    TRL's command line takes them."""
    found: list[str] = []
    while rest and not rest[0].startswith("--") and (every or not found):
        found.append(rest.pop(0))
    return found


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _is_bool(hint: Any) -> bool:
    return hint is bool or bool in typing.get_args(hint)


def _is_list(hint: Any) -> bool:
    return any((typing.get_origin(part) or part) is list for part in (hint, *typing.get_args(hint)))
