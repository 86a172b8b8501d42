"""`lowvram-grpo train`: flags to a recipe, a recipe to a run."""

from __future__ import annotations

import typing
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.faults import boundary
from lowvram_grpo.run.quiet import hush


def start(options: dict[str, Any], extra: list[str], *, config: Path | None, resume: str | None, dry_run: bool) -> None:
    """Resolve and run. With `resume`, the recipe of that run is the recipe file.

    Raises:
        UserError: an unknown flag, or whatever the job finds wrong.
    """
    notice = prepare_cuda()
    hush()
    from lowvram_grpo.jobs.train import run
    from lowvram_grpo.policy.hub import offline_where_unreachable
    from lowvram_grpo.policy.known_models import named
    from lowvram_grpo.recipe.resolve import resolve
    from lowvram_grpo.run.directory import RunDirectory

    flags = {key: value for key, value in options.items() if not (value is None or value is False or value == [])}
    flags |= parse_extra(extra)
    if "output_dir" in flags:
        flags["output_dir"] = str(flags["output_dir"])
    held: AbstractContextManager = nullcontext()
    if resume:
        if config:
            raise UserError("--resume takes the recipe of its run; drop --config.")
        directory = RunDirectory.open(resume)
        config = directory.recipe_path
        if not dry_run:
            # Before the recipe is read: another process may be about to write it.
            held = directory.lock()
    say = lambda sentence: print(f"[lowvram-grpo] {sentence}")
    if notice:
        say(notice)
    with held:
        recipe = resolve(flags, config)
        recipe.resume = resume
        if recipe.model:
            recipe.model = named(recipe.model, say)
        offline_where_unreachable([recipe.model, recipe.adapter, recipe.data, recipe.eval_data], say)
        with boundary(recipe.given_settings()):
            run(recipe, dry_run=dry_run)


def prepare_cuda() -> str | None:
    """What has to be settled before CUDA starts: the allocator, and one card of several. Returns a sentence for people
    where there was a choice."""
    from lowvram_grpo.memory.devices import growing_segments, pin_card

    growing_segments()
    return pin_card()


def parse_extra(arguments: list[str]) -> dict[str, Any]:
    """Settings without an option of their own (GRPOConfig fields, TRL's names, job keys with underscores) from
    `--learning-rate 1e-5`, `--learning_rate=1e-5`, `--bf16` and `--no-bf16`. Given several times, a setting that
    is a list takes all values, any other the last.

    Raises:
        UserError: an argument that is no flag, an unknown flag, or a flag without its value.
    """
    from lowvram_grpo.recipe.resolve import ALIASES, IGNORED, LOADING, job_types, training_types

    types = {**training_types(), **job_types(), **dict.fromkeys([*LOADING, "use_peft"], bool)}
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
        elif key not in types and key not in ALIASES and key not in IGNORED:
            known = [f"--{n.replace('_', '-')}" for n in types]
            raise UserError(f"Unknown flag {raw.partition('=')[0]}{did_you_mean('--' + key.replace('_', '-'), known)}.")
        elif not has_value:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif _is_bool(types.get(key)):
                value = "true"
            else:
                raise UserError(f"--{name} needs a value.")
        if key in found and _is_list(types.get(ALIASES.get(key, key))):
            earlier = found[key] if isinstance(found[key], list) else [found[key]]
            found[key] = [*earlier, value]
        else:
            found[key] = value
    return found


def _is_bool(hint: Any) -> bool:
    return hint is bool or bool in typing.get_args(hint)


def _is_list(hint: Any) -> bool:
    return any((typing.get_origin(part) or part) is list for part in (hint, *typing.get_args(hint)))
