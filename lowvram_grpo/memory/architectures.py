"""Well-known models by name: the configuration without the hub, so that memory can be planned before anything loads.

`architectures.json` holds, a family at a time, the values of the published config.json files (those of the Instruct
models where they differ) and the published number of parameters, tied weights counted once. Gemma 3 4B is its language
model alone: what there is to train on text.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError, did_you_mean, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Parts of a hub id that say how a model was tuned or packed, and leave its shape alone.
_SAME_SHAPE = frozenset(
    {"instruct", "it", "pt", "base", "chat", "coder", "math", "thinking", "reasoning", "2507", "meta", "hf"}
    | {"unsloth", "bnb", "4bit", "8bit", "awq", "gptq", "int4", "int8", "fp8"}
)
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


def family(model: str) -> list[str]:
    """The table's models of the family that `model` belongs to, the smallest first; empty where it is in none."""
    name = lookup(model)
    return next((list(models) for models in _families().values() if name in models), [])


def parameters(model: str) -> int | None:
    """Published number of parameters, tied weights once; None for a model that is not in the table."""
    name = lookup(model)
    return next((models[name]["parameters"] for models in _families().values() if name in models), None)


def config_dict(name: str) -> dict[str, Any]:
    """Arguments of `transformers.AutoConfig.for_model` for a model by its name in the table."""
    models = next(models for models in _families().values() if name in models)
    return {key: value for key, value in models[name].items() if key != "parameters"}


def resolve_config(model: str) -> tuple[PretrainedConfig, str]:
    """The configuration of `model`, and where it comes from, for people.

    `model` is a folder with a config.json, the file itself, a GGUF file, a name that `lookup` knows, or a hub id; the
    hub (or its cache) is asked last, so that planning a model of the table works without a network.

    Raises:
        UserError: none of these.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        from lowvram_grpo.policy.load import model_config

        return model_config(str(path)), str(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"The folder {model!r} has no config.json; name the folder that the model was saved in.")
    if path.is_dir() or path.is_file():
        try:
            return AutoConfig.from_pretrained(str(path)), str(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{model!r} is not a model's configuration ({one_line(error)}).") from error
    name = lookup(model)
    if name is not None:
        return AutoConfig.for_model(dtype="bfloat16", **config_dict(name)), f"the table of architectures ({name})"
    try:
        return AutoConfig.from_pretrained(model), f"the hub ({model})"
    except (OSError, ValueError) as error:
        near = did_you_mean(_tail(model), map(str.lower, names()))
        raise UserError(
            f"{model!r} is no folder with a config.json, not in the table of architectures{near}, and could not be "
            f"fetched from the hub ({one_line(error)}); name a local folder, or one of {', '.join(names())}."
        ) from error


@cache
def _families() -> dict[str, dict[str, dict[str, Any]]]:
    """Family -> name -> configuration with `parameters`, each family sorted by size."""
    table = json.loads(files("lowvram_grpo.memory").joinpath("architectures.json").read_text(encoding="utf-8"))
    merged = {}
    for name, entry in table.items():
        by_size = sorted(entry["models"].items(), key=lambda item: item[1]["parameters"])
        merged[name] = {model: {**entry["common"], **own} for model, own in by_size}
    return merged


def _tail(model: str) -> str:
    """Without the owner, in lower case."""
    return model.strip().rstrip("/").rsplit("/", 1)[-1].lower()


def _key(model: str) -> str:
    """What two spellings of one shape have in common: separators do not count, nor the parts of `_SAME_SHAPE`."""
    return "".join(part for part in re.split(r"[-_:\s]+", _tail(model)) if part not in _SAME_SHAPE)
