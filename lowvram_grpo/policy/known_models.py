"""Well-known models by name: the configuration without the hub, so that memory can be planned before anything loads.

`known_models.json` holds, a family at a time, the values of the published config.json files (those of the Instruct
models where they differ) and the published number of parameters, tied weights counted once. Gemma 3 4B is its language
model alone: what there is to train on text.

`hub` lists the repositories of that shape. The first is what the bare name means: the repository of that very name, or
the instruct model where there is none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

from lowvram_grpo.errors import did_you_mean

# Parts of a hub id that say how a model was tuned or packed, and leave its shape alone.
_SAME_SHAPE = frozenset(
    {"instruct", "it", "pt", "base", "chat", "coder", "math", "thinking", "reasoning", "2507", "meta", "hf"}
    | {"unsloth", "bnb", "4bit", "8bit", "awq", "gptq", "int4", "int8", "fp8"}
)
# Those of them that make no other model, and two words for one thing.
_SAME_MODEL = frozenset({"meta", "hf"})
_SYNONYMS = {"it": "instruct", "pt": "base"}
# Names that leave out a part of the table's.
_SHORT = {"mistral7b": "Mistral-7B-v0.3"}


def names() -> list[str]:
    """Every model of the table, family by family, the smallest first."""
    return [name for family in _families().values() for name in family]


def lookup(model: str) -> str | None:
    """The table's name of `model` (`Qwen/Qwen2.5-7B-Instruct`, `qwen2.5:7b`, `unsloth/llama-3.2-1b-bnb-4bit`), or
    None. The owner is ignored; so are parts that do not change the shape."""
    key = _key(model)
    return _SHORT.get(key) or next((name for name in names() if _key(name) == key), None)


def near(model: str) -> str:
    """` (did you mean X?)` for a misspelled name of the table, or an empty string."""
    return did_you_mean(_tail(model), map(str.lower, names()))


def family(model: str) -> list[str]:
    """The table's models of the family that `model` belongs to, the smallest first; empty where it is in none."""
    name = lookup(model)
    return next((list(models) for models in _families().values() if name in models), [])


def parameters(model: str) -> int | None:
    """Published number of parameters, tied weights once; None for a model that is not in the table."""
    name = lookup(model)
    return _entry(name)["parameters"] if name else None


def config_dict(name: str) -> dict[str, Any]:
    """Arguments of `transformers.AutoConfig.for_model` for a model by its name in the table."""
    return {key: value for key, value in _entry(name).items() if key not in ("parameters", "hub")}


def repository(model: str) -> str | None:
    """The hub repository that a name without an owner means (`Qwen2.5-0.5B`, `qwen2.5-coder-7b-instruct`), or None.

    Only repositories of the table are known, so a tuning that nobody has published under that name is None too.
    """
    name = lookup(model) if _is_bare(model) else None
    if name is None:
        return None
    known, tuning = _entry(name)["hub"], _tuning(model)
    return next((place for place in known if _tuning(place) == tuning), None if tuning else known[0])


def repositories(model: str) -> list[str]:
    """What the hub has of the shape that a name without an owner stands for; empty where that is not known."""
    name = lookup(model) if _is_bare(model) else None
    return list(_entry(name)["hub"]) if name else []


def named(model: str, tell: Callable[[str], None]) -> str:
    """What `--model` means: a folder or file that exists, else what `repository` knows, else `model` itself (a hub id,
    or a mistake). Whether it is there is not looked up.

    Args:
        model: as a person wrote it, or the absolute path that was made of it.
        tell: hears what a name stands for, and that a folder of that name goes first.
    """
    tail = os.path.basename(model)
    place = repository(tail)
    if os.path.exists(model):
        if place and os.path.abspath(model) == os.path.join(os.getcwd(), tail):
            tell(f"model: {tail} is the folder {os.path.abspath(model)}, not {place} on the hub.")
        return model
    if tail == model and place:
        tell(f"model: {model} is {place} on the hub.")
        return place
    return model


@cache
def _families() -> dict[str, dict[str, dict[str, Any]]]:
    """Family -> name -> configuration with `parameters` and `hub`, each family sorted by size."""
    table = json.loads(files("lowvram_grpo.policy").joinpath("known_models.json").read_text(encoding="utf-8"))
    merged = {}
    for name, entry in table.items():
        by_size = sorted(entry["models"].items(), key=lambda item: item[1]["parameters"])
        merged[name] = {model: {**entry["common"], **own} for model, own in by_size}
    return merged


def _entry(name: str) -> dict[str, Any]:
    return next(models[name] for models in _families().values() if name in models)


def _is_bare(model: str) -> bool:
    """Whether it is neither a path nor an id with its owner."""
    return not set(model) & set("/\\") and not model.lower().endswith((".gguf", ".json"))


def _tuning(model: str) -> frozenset[str]:
    """The parts of a name that leave the shape alone, and say which model of that shape it is."""
    parts = _SAME_SHAPE & set(_parts(model))
    return frozenset(_SYNONYMS.get(part, part) for part in parts - _SAME_MODEL)


def _tail(model: str) -> str:
    """Without the owner, in lower case."""
    return model.strip().rstrip("/").rsplit("/", 1)[-1].lower()


def _key(model: str) -> str:
    """What two spellings of one shape have in common: separators do not count, nor the parts of `_SAME_SHAPE`."""
    return "".join(part for part in _parts(model) if part not in _SAME_SHAPE)


def _parts(model: str) -> list[str]:
    return re.split(r"[-_:\s]+", _tail(model))
