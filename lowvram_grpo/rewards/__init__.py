"""Reward functions under the names that TRL and Open R1 export them by; each is loaded at its first use."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "accuracy_reward": "verified",
    "reasoning_accuracy_reward": "verified",
    "format_reward": "forms",
    "think_format_reward": "forms",
    "tag_count_reward": "forms",
    "reasoning_steps_reward": "forms",
    "get_code_format_reward": "forms",
    "len_reward": "lengths",
    "get_cosine_scaled_reward": "lengths",
    "get_repetition_penalty_reward": "lengths",
    "get_soft_overlong_punishment": "lengths",
    "language_consistency": "language",
    "code_reward": "code",
    "binary_code_reward": "code",
    "extract_code": "code",
    "ioi_code_reward": "builtin",
    "cf_code_reward": "builtin",
    "get_reward_funcs": "builtin",
    "GRPOScriptArguments": "settings",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
