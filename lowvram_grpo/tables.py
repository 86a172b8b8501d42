"""Tables of keys and values in TOML and YAML files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowvram_grpo.errors import UserError


def read_table(path: str | Path) -> dict[str, Any]:
    """The table in a TOML or YAML recipe. `1e-6` is a number in both (PyYAML alone reads it as text)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # editors on Windows like to write the mark
    except OSError as error:
        raise UserError(f"The recipe {str(path)!r} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The recipe {str(path)!r} is not UTF-8 text; save it as UTF-8.") from error
    try:
        table = _parse_yaml(text) if Path(path).suffix.lower() in (".yaml", ".yml") else parse_toml(text)
    except ValueError as error:
        reason = str(error).strip().replace("\n", " ")
        raise UserError(f"The recipe {str(path)!r} is not valid: {reason}") from error
    if not isinstance(table, dict):
        raise UserError(f"The recipe {str(path)!r} must be a table of keys and values.")
    return table


def parse_toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
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
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
