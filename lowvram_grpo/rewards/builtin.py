"""The rewards that have a name: those without parameters, and what a recipe's settings make of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.rewards import sandbox
from lowvram_grpo.rewards.code import BinaryCodeReward, CodeReward, check_provider
from lowvram_grpo.rewards.forms import (
    format_reward,
    get_code_format_reward,
    reasoning_steps_reward,
    tag_count_reward,
    think_format_reward,
)
from lowvram_grpo.rewards.gym_scores import reasoning_gym
from lowvram_grpo.rewards.language import language_consistency
from lowvram_grpo.rewards.lengths import (
    UNSIZED_PUNISHMENT,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    len_reward,
)
from lowvram_grpo.rewards.maths import accuracy
from lowvram_grpo.rewards.settings import CODE_LANGUAGES, RewardSettings
from lowvram_grpo.rewards.tags import content, format, label, label_strict
from lowvram_grpo.rewards.verified import accuracy_reward, reasoning_accuracy_reward

_FIXED: dict[str, Callable] = {
    "label": label,
    "label_strict": label_strict,
    "content": content,
    "accuracy": accuracy,
    "format": format,
    "language_consistency": language_consistency,
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy": reasoning_accuracy_reward,
    "format_reward": format_reward,
    "think_format": think_format_reward,
    "tag_count": tag_count_reward,
    "reasoning_steps": reasoning_steps_reward,
    "len": len_reward,
    "reasoning_gym": reasoning_gym,
}

# What the best completion gets; from any other function it is taken to be 1.
FULL_MARKS: dict[str, float] = {"label": 5.0, "label_strict": 10.0, "content": 5.0, "len": 0.5}

# Names that TRL's and Open R1's scripts have for the same functions.
SYNONYMS = {
    "length": "len",
    "get_soft_overlong_punishment": "soft_overlong_punishment",
    "soft_overlong_punishment_reward": "soft_overlong_punishment",
    "cosine_scaled_reward": "cosine",
    **{
        f"{name}_reward": name
        for name in (
            "reasoning_accuracy", "think_format", "tag_count", "reasoning_steps", "len", "repetition_penalty", "code",
            "binary_code", "code_format",
        )
    },
}  # fmt: skip

# Under Open R1's own key `reward_funcs` these two names are Open R1's functions, under `reward` and --reward ours.
OPEN_R1 = {"accuracy": "accuracy_reward", "format": "format_reward"}

REFUSED = {
    "ioi_code": "compiles C++ on Piston servers or Morph Cloud and fetches the tests of its olympiads",
    "cf_code": "runs programs on Piston servers and fetches the tests of Codeforces",
}
_JUDGED_BY = ("code", "binary_code")


def _cosine(s: RewardSettings) -> Callable:
    values = (
        s.cosine_min_value_wrong,
        s.cosine_max_value_wrong,
        s.cosine_min_value_correct,
        s.cosine_max_value_correct,
    )
    return get_cosine_scaled_reward(s.cosine_max_len, *values, unit="characters")


def _repetition(s: RewardSettings) -> Callable:
    return get_repetition_penalty_reward(s.repetition_n_grams, s.repetition_max_penalty, unit="words")


def _punishment(s: RewardSettings) -> Callable:
    longest, cache = s.max_completion_len, s.soft_punish_cache
    if not longest:
        return UNSIZED_PUNISHMENT
    cache = longest // 5 if cache is None else cache
    if cache > longest:
        raise UserError(
            f"soft_punish_cache is {cache}, more than max_completion_len, {longest}; it is the last part of it."
        )
    return get_soft_overlong_punishment(longest, cache)


def _code(kind: type[CodeReward]) -> Callable[[RewardSettings], Callable]:
    def made(s: RewardSettings) -> Callable:
        limits = sandbox.Limits(seconds=s.code_timeout, memory_bytes=s.code_memory_mib << 20)
        return kind(s.parallel_code_exec_per_proc, s.code_provider, s.enforce_same_language, limits)

    return made


_MADE: dict[str, Callable[[RewardSettings], Callable]] = {
    "cosine": _cosine,
    "repetition_penalty": _repetition,
    "soft_overlong_punishment": _punishment,
    "code": _code(CodeReward),
    "binary_code": _code(BinaryCodeReward),
    "code_format": lambda s: get_code_format_reward(s.code_language),
}

# With the settings that a recipe begins with.
BUILTIN: dict[str, Callable] = {**_FIXED, **{name: make(RewardSettings()) for name, make in _MADE.items()}}


def builtin(name: str, settings: RewardSettings | None = None) -> Callable:
    """The reward of a name in `BUILTIN` with `settings`, the defaults when None.

    Raises:
        UserError: settings that do not fit together, or programs that can't be run here or there.
    """
    settings = settings or RewardSettings()
    if name not in _MADE:
        return BUILTIN[name]
    if name in _JUDGED_BY:
        check_provider(settings.code_provider)
        if reason := sandbox.why_not():
            raise UserError(reason)
    if name == "code_format" and settings.code_language not in CODE_LANGUAGES:
        near = did_you_mean(settings.code_language, CODE_LANGUAGES)
        raise UserError(
            f"code_language is {settings.code_language!r}{near}; it must be one of {', '.join(CODE_LANGUAGES)}."
        )
    return _MADE[name](settings)


def refuse(name: str) -> None:
    """Raises:
    UserError: `name` is a reward of Open R1's that is not built in.
    """
    short = name.removesuffix("_reward")
    if short in REFUSED:
        raise UserError(
            f"the reward {name!r} of Open R1 is not built in: it {REFUSED[short]}; take code or binary_code, with "
            "tests in the data."
        )


class _Refused:
    """Stands in a list of functions for a reward that is refused, until it is called."""

    def __init__(self, name: str) -> None:
        self.__name__ = f"{name}_reward"

    def __call__(self, completions: Any, **columns: Any) -> list[float]:
        refuse(self.__name__)
        raise AssertionError(self.__name__)


ioi_code_reward, cf_code_reward = _Refused("ioi_code"), _Refused("cf_code")
_OPEN_R1_FUNCTIONS = {"ioi_code": ioi_code_reward, "cf_code": cf_code_reward}


def get_reward_funcs(script_args: Any) -> list[Callable]:
    """The functions that Open R1's script makes of its arguments.

    Args:
        script_args: `reward_funcs`, a list of names, and the parameters of `RewardSettings` as attributes; what it
            lacks has the default. `code_provider: e2b` is refused when a program is to be run.

    Raises:
        UserError: an unknown name.
    """
    given = {f.name: getattr(script_args, f.name) for f in fields(RewardSettings) if hasattr(script_args, f.name)}
    return [_function(name, RewardSettings(**given)) for name in script_args.reward_funcs]


def _function(name: str, settings: RewardSettings) -> Callable:
    own = OPEN_R1.get(name) or SYNONYMS.get(name, name)
    known: Mapping[str, Any] = {**BUILTIN, **_OPEN_R1_FUNCTIONS}
    if own not in known:
        raise UserError(f"unknown reward {name!r}{did_you_mean(name, [*known, *SYNONYMS])}; known: {', '.join(known)}.")
    return _MADE[own](settings) if own in _MADE else known[own]
