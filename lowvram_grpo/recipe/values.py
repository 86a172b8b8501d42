"""Text from a flag or a file as the type of its setting: a number, a switch, a list, a table."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.recipe.tables import parse_arguments


def cast(key: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type: text from a flag or a file becomes a number, a bool, a list or a dict.

    Raises:
        UserError: it cannot.
    """
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    kinds = [typing.get_origin(option) or option for option in options if option is not type(None)]
    # `none` is a value of some text fields (report_to), and no value of all others.
    absent = ("null",) if str in kinds else ("null", "none")
    if isinstance(value, str) and type(None) in options and value.lower() in absent:
        return None
    if dict in kinds and key.endswith("_kwargs") and isinstance(value, str):
        return parse_arguments(key, value)
    one_text = isinstance(value, str) and "," not in value
    for kind in sorted(kinds, key=_strictness):
        if kind is list and str in kinds and one_text:
            continue
        try:
            return _as(value, kind, next(o for o in options if (typing.get_origin(o) or o) is kind))
        except UserError:
            raise
        except (ValueError, TypeError):
            continue
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise UserError(f"{key} is {value!r}, which is not of type {wanted}.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


_WORDS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}


def _strictness(kind: Any) -> int:
    """Try the narrow types first: every text is a str, few are an int."""
    return {bool: 0, int: 1, float: 2, dict: 3, list: 4}.get(kind, 5 if kind is not str else 6)


def _as(value: Any, kind: Any, hint: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        return _WORDS[_lower_or_fail(value)]
    if kind in (int, float):
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return value if isinstance(value, int) else kind(value)  # 50 stays 50 where a float is allowed
    if kind is dict:
        table = json.loads(value) if isinstance(value, str) else value
        if not isinstance(table, dict):
            raise ValueError
        return table
    if kind is list:
        items = value if isinstance(value, (list, tuple)) else [v.strip() for v in str(value).split(",")]
        inner = (typing.get_args(hint) or (str,))[0]
        return [cast("an entry", item, inner) for item in items]
    if kind is str:
        if isinstance(value, (dict, list)):
            raise ValueError
        return str(value)
    if isinstance(kind, type) and hasattr(kind, "__members__"):  # an enum of transformers: keep its text
        return str(value)
    if kind is Any or value is None:
        return value
    raise ValueError


def _lower_or_fail(value: Any) -> str:
    text = str(value).lower()
    if text not in _WORDS:
        raise ValueError
    return text
