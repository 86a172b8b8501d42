"""One resolved recipe: defaults < preset < recipe file < flags.

A recipe is a flat table. Keys of the job (model, data, rewards, adapter ...) are fields of `Recipe`; every other key is
a field of GRPOConfig and lands in `Recipe.training`. Anything else is an error with a suggestion.
"""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.recipe import preset
from lowvram_grpo.recipe.all_weights import settle_all_weights
from lowvram_grpo.recipe.not_applied import NEVER, NotApplied, left_out
from lowvram_grpo.recipe.ranges import LORA_RANGES, REWARD_RANGES, check_ranges
from lowvram_grpo.recipe.tables import read_table
from lowvram_grpo.recipe.unknown_names import instead_of
from lowvram_grpo.recipe.values import cast
from lowvram_grpo.rewards.registry import as_open_r1, is_builtin, parse_spec
from lowvram_grpo.rewards.settings import ARGUMENTS, RewardSettings
from lowvram_grpo.run.directory import RECIPE_HEADER

# Keys of TRL's, open-r1's and ms-swift's recipes that have another name here.
ALIASES = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "dataset_config": "data_config",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
    "dataset_prompt_column": "prompt_column",
    "reward_funcs": "reward",
    "torch_dtype": "dtype",
    "adapter_name_or_path": "adapter",
    "evaluation_strategy": "eval_strategy",
    "hub_model_revision": "hub_revision",
    "wandb_log_unique_prompts": "log_unique_prompts",
    **ARGUMENTS,
}
# Accepted from TRL recipes; 4-bit is always NF4, with nested constants.
IGNORED = ("overwrite_output_dir", "bnb_4bit_quant_type", "use_bnb_nested_quant", "lora_task_type")
# TRL's, for a reward model that comes before the functions.
REWARD_MODEL = "reward_model_name_or_path"
LOADING = ("load_in_4bit", "load_in_8bit")
CHOICES = {
    "memory_plan": ("auto", "savers", "off"),
    "quantization": ("none", "int8", "nf4"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
# What the command line sets where nobody else does.
JOB_DEFAULTS: dict[str, Any] = {"cold_start": "auto", "save_steps": 50, "save_total_limit": 2}


@dataclass
class Recipe(RewardSettings):
    """Everything a run needs, the parameters of its rewards included. `training` holds the GRPOConfig fields that were
    set, cast to their types."""

    model: str | None = None
    model_revision: str | None = None
    data: str | list[str] | None = None
    data_weights: list[float] | None = None
    dataset_mixture: dict[str, Any] | None = None
    stream: bool = False
    data_config: str | None = None
    split: str | None = None
    eval_data: str | None = None
    eval_split: str | None = None
    template: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    system_prompt: str | None = None
    few_shot: str | None = None
    chat_template: str | None = None
    reward: list[str] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    environment: str | None = None
    preset: str = "auto"
    memory_plan: str = "auto"
    quantization: str = "none"
    dtype: str = "auto"
    attn_implementation: str | None = None
    adapter: str | None = None
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: str | list[str] = "all-linear"
    lora_modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    use_peft: bool = True
    wandb_entity: str | None = None
    wandb_project: str | None = None
    wandb_run_group: str | None = None
    output_dir: str | None = None
    resume: str | None = None
    plain: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict, compare=False)
    # Neither is written down: what was left out is in nothing that goes on, and a variable may be a token.
    not_applied: list[NotApplied] = field(default_factory=list, compare=False)
    env: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def places(self) -> list[str]:
        """Of all its training data."""
        if self.dataset_mixture:
            listed = self.dataset_mixture.get("datasets") or []
            return [str(entry.get("id")) for entry in listed if isinstance(entry, Mapping)]
        return [self.data] if isinstance(self.data, str) else list(self.data or [])

    @property
    def hub_arguments(self) -> dict[str, Any]:
        """Arguments that every from_pretrained of the model takes."""
        found = {"trust_remote_code": bool(self.training.get("trust_remote_code", False))}
        return {**found, "revision": self.model_revision} if self.model_revision else found

    def given_settings(self) -> dict[str, Any]:
        """What a person set, by flag or file, as setting -> value."""
        values = {**vars(self), **self.training}
        return {key: values[key] for key, who in self.origin.items() if who in ("flag", "file") and key in values}

    def to_toml(self) -> str:
        """As a recipe file that resolves to this recipe again; a comment on each line says who set it."""
        import tomli_w

        left_out = _NOT_WRITTEN | (_OF_REWARDS - self.origin.keys())  # most rewards have no parameters
        table = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        lines = [RECIPE_HEADER]
        for key, value in {**table, **self.training}.items():
            if value is None:
                if key not in self.training:
                    continue
                value = "null"  # TOML has no null, and GRPOConfig's default may be a number
            elif isinstance(value, dict):
                value = json.dumps(value)  # a table of TOML holds no null either, and swallows the keys after it
            text = tomli_w.dumps({key: value}).strip()
            origin = self.origin.get(key, "default")
            lines.append(text if "\n" in text else f"{text}  # {origin}")
        return "\n".join(lines) + "\n"


# Who sets one of these counts in completions, as TRL does; a preset's prompts_per_step must not outvote it.
_TRL_BATCH = ("gradient_accumulation_steps", "generation_batch_size", "steps_per_generation")
_NOT_WRITTEN = {"training", "origin", "resume", "output_dir", "not_applied", "env"}
_OF_RESOLVING = ("training", "origin", "not_applied", "env")
_OF_REWARDS = {f.name for f in fields(RewardSettings)}
# Settings that may be local paths; a reward may be one in part.
_PLACES = {"model", "data", "eval_data", "adapter", "few_shot"}
_JOB_TYPES = {name: hint for name, hint in typing.get_type_hints(Recipe).items() if name not in _OF_RESOLVING}


def resolve(flags: Mapping[str, Any], config_file: Path | None = None) -> Recipe:
    """Merge defaults, preset, recipe file and flags; values are cast to the type of their field. A flag that is None
    was not given; a null in a file is a value, where the field has room for it. Local paths that exist become absolute.

    Raises:
        UserError: unknown key (with a suggestion and where it stands), a value of the wrong type or out of range, an
            unreadable file.
    """
    file = read_table(config_file) if config_file else {}
    env = _environment(file.pop("env", None), f"in {config_file}")
    given = {key: value for key, value in flags.items() if value is not None}
    from_file, from_flags = _named(file, f"in {config_file}"), _named(given, "on the command line")
    not_applied = left_out({str(key).replace("-", "_"): value for key, value in [*file.items(), *given.items()]})
    name = from_flags.get("preset") or from_file.get("preset") or "auto"
    chosen = preset.pick() if name == "auto" else name
    layers = {
        "default": _named(JOB_DEFAULTS, "in the defaults"),
        f"preset {chosen}": _named(preset.load(chosen).settings, f"in preset {chosen}"),
        "file": from_file,
        "flag": from_flags,
    }
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for layer, settings in layers.items():
        values.update(settings)
        origin.update(dict.fromkeys(settings, layer))
    if origin.get("prompts_per_step", "").startswith("preset") and any(
        origin.get(key) in ("file", "flag") for key in _TRL_BATCH
    ):
        del values["prompts_per_step"]
    values["preset"] = chosen
    settle_all_weights(values, origin)
    if values.get("do_eval") is False and "eval_strategy" not in values:
        values["eval_strategy"], origin["eval_strategy"] = "no", origin["do_eval"]
    if "model_name_or_path" in file and "use_peft" not in origin:
        not_applied.append(NotApplied(("use_peft",), _AN_ADAPTER))
    job = {k: v for k, v in values.items() if k in _JOB_TYPES}
    for key, allowed in CHOICES.items():
        if key in job and job[key] not in allowed:
            raise UserError(f"{key} is {job[key]!r}; it must be one of {', '.join(allowed)}.")
    check_ranges(job, {**LORA_RANGES, **REWARD_RANGES})
    for key in _PLACES & job.keys():
        job[key] = _anchored(job[key])
    if job.get("chat_template") != "plain":
        job["chat_template"] = _anchored(job.get("chat_template"))
    job["reward"] = [_anchored_reward(spec) for spec in job.get("reward", [])]
    job["tools"] = [_anchored_code(spec) for spec in job.get("tools", [])]
    job["environment"] = _anchored_code(job["environment"]) if job.get("environment") else None
    training = {k: v for k, v in values.items() if k not in _JOB_TYPES}
    return Recipe(**job, training=training, origin=origin, not_applied=not_applied, env=env)


_AN_ADAPTER = (
    "not set, which is all weights in TRL and Open R1; here it is a LoRA adapter, for which learning rates are usually "
    "ten times as high; use_peft: false trains all weights"
)


def _environment(table: Any, where: str) -> dict[str, str]:
    """The variables that a recipe of TRL's command line sets.

    Raises:
        UserError: it is no table.
    """
    if table is not None and not isinstance(table, Mapping):
        raise UserError(f"env is {table!r} {where}; it must be a table of environment variables.")
    return {str(key): str(value) for key, value in (table or {}).items()}


def _anchored(place: Any) -> Any:
    """A local path that exists as an absolute one, so that the written recipe works from any folder; else (a hub id,
    a mistake) `place` itself. Of several places each."""
    if not place:
        return place
    if isinstance(place, list):
        return [_anchored(each) for each in place]
    path = os.path.expanduser(place)
    return os.path.abspath(path) if os.path.exists(path) else place


def _anchored_code(spec: str) -> str:
    """`file.py`, or `file.py:NAME`."""
    file, end, names = spec.strip().rpartition(".py")
    return f"{_anchored(file + end)}{names}" if end else spec


def _anchored_reward(spec: str) -> str:
    target = parse_spec(spec).target
    if is_builtin(target):
        return spec
    return f"{_anchored(target)}{spec.strip()[len(target) :]}"


def _named(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys under their own names, values cast. `where` names the place in errors."""
    found: dict[str, Any] = {}
    model: list[str] = []
    training = training_types()
    for raw, value in table.items():
        key = str(raw).replace("-", "_")
        if key in IGNORED or key in NEVER:
            continue
        if key == REWARD_MODEL:
            model = [] if value is None else [str(value)]
            continue
        if key in LOADING and value is not None:
            if cast(key, value, bool):
                found["quantization"] = "nf4" if key == "load_in_4bit" else "int8"
            else:
                found.setdefault("quantization", "none")
            continue
        key = ALIASES.get(key, key)
        hint = _JOB_TYPES.get(key) or training.get(key)
        if hint is None and key not in LOADING:
            known = [*_JOB_TYPES, *training, *ALIASES]
            raise UserError(f"Unknown setting {raw!r} {where}{instead_of(key, known)}.")
        if value is not None:
            found[key] = _data(value) if key == "data" else cast(key, value, hint)
            if str(raw).replace("-", "_") == "reward_funcs":
                found[key] = [as_open_r1(spec) for spec in found[key]]
        elif type(None) in typing.get_args(hint):
            found[key] = None
    if model:
        found["reward"] = [*model, *found.get("reward", [])]
    return found


def _data(value: Any) -> str | list[str]:
    """One place, which may have commas in its name, or several."""
    places = [str(place) for place in value] if isinstance(value, (list, tuple)) else [str(value)]
    if isinstance(value, dict) or not places:
        raise UserError(f"data is {value!r}; it must be one name, or a list of names.")
    return places[0] if len(places) == 1 else places


def job_types() -> dict[str, Any]:
    """Key -> type of every setting of the job, as in `Recipe`."""
    return dict(_JOB_TYPES)


def training_types() -> dict[str, Any]:
    """Field name -> type of every GRPOConfig field (imports torch and transformers)."""
    from lowvram_grpo.recipe.config import GRPOConfig

    hints = typing.get_type_hints(GRPOConfig)
    return {f.name: hints[f.name] for f in fields(GRPOConfig) if f.init and f.name not in ("output_dir",)}


def typed(key: str, value: Any) -> Any:
    """`value` (text from a preset's ladder, say) as the type of the setting `key`."""
    return cast(key, value, _JOB_TYPES.get(key) or training_types()[key])
