"""Well-known models by name: the configuration without the hub, so that memory can be planned before anything loads.

`known_models.json` holds, a family at a time, the values of the published config.json files (those of the Instruct
models where they differ) and the number of parameters that transformers' model of them has, tied weights counted once,
which is within 1 % of the published one. Of models that also see or hear (Gemma 3 4B, Gemma 4, Qwen3.5, Ministral 3) it
is the language model alone: what there is to train on text. Multipliers and rotary scales that move no bytes are left
at transformers' defaults where they are not known. `layers` says in short what `layer_types` lists.

`hub` lists the repositories of that shape. Which of them a name means is `meaning`; a table's name that no repository
has says the shape alone, which is enough to plan with.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from lowvram_grpo.errors import did_you_mean

# Parts of a hub id that say how a model was packed: its weights are those of the one without them, rounded.
_PACKED = frozenset({"unsloth", "bnb", "4bit", "8bit", "awq", "gptq", "int4", "int8", "fp8", "mxfp4"})
# Those that say what it was made for, and those that say how it was tuned.
_TOPICS = frozenset({"coder", "math"})
_TUNED = frozenset({"instruct", "it", "chat", "thinking", "think", "reasoning"})
# Those that make no other model: owners' names, dates of a family's only release, and what most are stored in.
_SAME_MODEL = frozenset({"meta", "hf", "2512", "1025", "1125", "bf16"})
# None of these changes the shape.
_SAME_SHAPE = _PACKED | _TOPICS | _TUNED | _SAME_MODEL | {"base", "pt", "2507"}
_SYNONYMS = {"it": "instruct", "chat": "instruct", "think": "thinking", "pt": "base"}
# Names that leave out a part of the table's, and ollama's that have another order.
_SHORT = {
    "mistral7b": "Mistral-7B-v0.3", "granite4350mh": "Granite-4.0-H-350M", "granite41bh": "Granite-4.0-H-1B",
    "granite4microh": "Granite-4.0-H-Micro", "granite4tinyh": "Granite-4.0-H-Tiny",
    "granite4smallh": "Granite-4.0-H-Small",
}  # fmt: skip


class Meaning(NamedTuple):
    """What a name without an owner means: `place` on the hub, or, where that is None, one of `others`."""

    place: str | None
    others: list[str]


def names() -> list[str]:
    """Every model of the table, family by family, the smallest first."""
    return [name for family in _families().values() for name in family]


def lookup(model: str) -> str | None:
    """The table's name of `model` (`Qwen/Qwen2.5-7B-Instruct`, `qwen2.5:7b`, `unsloth/llama-3.2-1b-bnb-4bit`), or
    None. The owner is ignored; so are parts that do not change the shape."""
    key = _key(model)
    return _SHORT.get(key) or next((name for name in names() if _key(name) == key), None)


def near(model: str) -> str:
    """` (did you mean X?)` for a misspelled name of the table or of a repository in it, or an empty string."""
    known = [*names(), *(place.split("/")[1] for name in names() for place in _entry(name)["hub"])]
    return did_you_mean(_tail(model), map(str.lower, known))


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
    entry = {key: value for key, value in _entry(name).items() if key not in ("parameters", "hub")}
    if layers := entry.pop("layers", None):
        kinds = {index: kind for kind, where in layers.items() if kind != "others" for index in where}
        entry["layer_types"] = [kinds.get(index, layers["others"]) for index in range(entry["num_hidden_layers"])]
    return entry


def meaning(model: str) -> Meaning | None:
    """What a name without an owner (`Qwen2.5-0.5B`, `qwen3.5:4b`, `qwen2.5-coder-7b-instruct`) means; None where the
    table does not know its shape.

    A repository of that very name is meant, or the one that is tuned as the name says. Names with a colon are
    ollama's, where one without a tuning means a tuned model: both are `others` where they differ. So are all that the
    name may stand for where it leaves out which (`gemma-3-4b`, `Qwen3-4B-Instruct`).
    """
    name = lookup(model) if is_bare(model) else None
    if name is None:
        return None
    known, tuning, tail = _entry(name)["hub"], _tuning(model), _tail(model)
    if exact := [place for place in known if _tail(place) == tail]:
        return Meaning(exact[0], [])
    same = [place for place in known if _tuning(place) == tuning][:1]
    if ":" in model and not tuning:
        plain = [place for place in known if is_tuned(place) and not _TOPICS & _tuning(place)]
        same += [place for place in _one_a_tuning(plain) if place not in same]
    if len(same) == 1:
        return Meaning(same[0], [])
    close = same or [place for place in known if tuning <= _tuning(place)]
    return Meaning(None, _one_a_tuning(close or known))


def repository(model: str) -> str | None:
    """The hub repository that a name without an owner means (`meaning`), or None."""
    meant = meaning(model)
    return meant and meant.place


def repositories(model: str) -> list[str]:
    """What the hub has of the shape that a name without an owner stands for; empty where that is not known."""
    name = lookup(model) if is_bare(model) else None
    return list(_entry(name)["hub"]) if name else []


def shortened(model: str) -> list[str]:
    """The table's models whose names go on where that of `model` ends (`qwen2.5`, `gemma-4`, `qwen3:30b`), each family
    by size; empty for a name that is whole, or none of the table's."""
    key = _key(model)
    if not is_bare(model) or not key or lookup(model):
        return []
    return [name for name in names() if key in _beginnings(name)]


def is_tuned(place: str) -> bool:
    """Whether a repository of the table holds a model that was tuned to follow instructions or to think, rather than
    a base model. Where its name does not say, its family's other names do: beside a `-Base` it is tuned, beside an
    `-Instruct` it is the base, alone it is tuned."""
    words = _tuning(place) - _TOPICS - _PACKED
    if words:
        return "base" not in words
    beside = [_tuning(other) for other in siblings(place)]
    return any("base" in other for other in beside) or not any(other & _TUNED for other in beside)


def siblings(place: str) -> list[str]:
    """The other repositories of the table with the shape and the topic (code, mathematics) of this one."""
    name = lookup(place)
    topic = _TOPICS & _tuning(place)
    found = _entry(name)["hub"] if name else []
    return [other for other in found if other != place and _TOPICS & _tuning(other) == topic]


def packaging(model: str) -> str | None:
    """How a name says that the weights are stored: nf4, int8 (bitsandbytes'), awq, gptq, fp8 ...; None where not."""
    words = set(_parts(model))
    if "bnb" in words:
        return "int8" if "8bit" in words else "nf4"
    return next((kind for kind in ("awq", "gptq", "fp8", "mxfp4", "int8", "int4") if kind in words), None)


def unpacked(model: str) -> str:
    """A name without the parts that say how the weights are stored."""
    return "-".join(part for part in re.split(r"[-_\s]+", model) if part.lower() not in _PACKED)


def is_bare(model: str) -> bool:
    """Whether it is neither a path nor an id with its owner."""
    return not set(model) & set("/\\") and not model.lower().endswith((".gguf", ".json"))


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


def _tuning(model: str) -> frozenset[str]:
    """The parts of a name that leave the shape alone, and say which model of that shape it is."""
    parts = _SAME_SHAPE & set(_parts(model))
    return frozenset(_SYNONYMS.get(part, part) for part in parts - _SAME_MODEL)


def _one_a_tuning(places: list[str]) -> list[str]:
    """The first of those that are the same model in another packaging."""
    found: dict[frozenset[str], str] = {}
    for place in places:
        found.setdefault(_tuning(place), place)
    return list(found.values())


def _beginnings(name: str) -> set[str]:
    """All that a name of the table can be cut to at the end of a word or number, spelled as `_key` does."""
    found, text = set(), ""
    for part in _parts(name):
        for piece in re.findall(r"^[a-z]+(?=[\d.]+b?$)|.+", part):
            text += piece
            found.add(text)
    return found


def _tail(model: str) -> str:
    """Without the owner, in lower case."""
    return model.strip().rstrip("/").rsplit("/", 1)[-1].lower()


def _key(model: str) -> str:
    """What two spellings of one shape have in common: separators do not count, nor the parts of `_SAME_SHAPE`."""
    return "".join(part for part in _parts(model) if part not in _SAME_SHAPE)


def _parts(model: str) -> list[str]:
    """`granite-4.0-h-tiny` -> granite, 4, h, tiny: a version that ends in .0 is written without it, too."""
    return [re.sub(r"(?<=\d)\.0$", "", part) for part in re.split(r"[-_:\s]+", _tail(model))]
