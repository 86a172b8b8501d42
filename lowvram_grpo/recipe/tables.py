"""Tables of keys and values: in TOML and YAML files, and as one setting on the command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from lowvram_grpo.data.textfile import read_text
from lowvram_grpo.errors import UserError, one_line


def read_table(path: str | Path) -> dict[str, Any]:
    """The table in a TOML or YAML recipe. `1e-6` is a number in both (PyYAML alone reads it as text)."""
    text = read_text(path, f"The recipe {str(path)!r}")
    try:
        table = _parse_yaml(text) if Path(path).suffix.lower() in (".yaml", ".yml") else parse_toml(text)
    except ValueError as error:
        raise UserError(f"The recipe {str(path)!r} is not valid: {error}.") from error
    if not isinstance(table, dict):
        raise UserError(f"The recipe {str(path)!r} must be a table of keys and values.")
    return table


def parse_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2 in two places where 1.1 surprises: floats need no dot, and off, no, on, yes are words, not bools
        (`cold_start: off`, `save_strategy: no`)."""

        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), "tTfF")
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem or error.context}{at}") from error
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error


def parse_arguments(key: str, text: str) -> dict[str, Any]:
    """A table of arguments from a JSON object, or from `name=value,name=value` with JSON values (a value that is none
    is text; true, false and null may be written as Python writes them).

    Raises:
        UserError: it is neither.
    """
    try:
        table = json.loads(text)
    except ValueError:
        table = None
        parts = [part.partition("=") for part in text.split(",")]
        # A comma or a bracket inside a value could be meant in several ways.
        if all(name.strip().isidentifier() and value.strip() for name, _, value in parts) and not re.search(
            r"[\[\]{}\"']", text
        ):
            table = {name.strip(): _json_or_text(value.strip()) for name, _, value in parts}
    if not isinstance(table, dict):
        raise UserError(
            f"{key} is {text!r}, which is no table of arguments; write it as JSON, '{{\"name\": false}}' (in quotes "
            "for the shell), or as name=false."
        )
    return table


def _json_or_text(value: str) -> Any:
    plain = {"true": True, "false": False, "null": None, "none": None}
    if value.lower() in plain:
        return plain[value.lower()]
    try:
        return json.loads(value)
    except ValueError:
        return value
