"""What a reward function says of itself before it is called: its name, and what it asks for."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.model import model_name
from lowvram_grpo.rewards.registry import BUILTIN, SYNONYMS, is_address
from lowvram_grpo.rewards.remote import HTTPReward

_ATOMS = frozenset((str, int, float, bool, type(None)))


def known(func: Any) -> Any:
    """The function that a name or an address stands for; other names are models', and stay."""
    if isinstance(func, str) and is_address(func):
        return HTTPReward(func)
    return BUILTIN.get(SYNONYMS.get(func, func), func) if isinstance(func, str) else func


def name_of(func: Callable) -> str:
    """What a function is called in metrics; a partial one as what it calls."""
    while isinstance(func, partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def names_before_loading(funcs: Sequence[Any]) -> tuple[list[str], bool]:
    """The names that a runner of these functions will have, without loading a model, and whether some function can log
    metrics of its own: it takes `log_metric`, or everything."""
    names, logs = [], False
    for func in funcs:
        func = known(func)
        if isinstance(func, (str, torch.nn.Module)):
            names.append(model_name(func))
            continue
        names.append(name_of(func))
        try:
            parameters = inspect.signature(func).parameters.values() if func not in BUILTIN.values() else ()
        except (TypeError, ValueError):  # a function in C without a signature
            parameters = ()
        logs = logs or any(p.name == "log_metric" or p.kind is p.VAR_KEYWORD for p in parameters)
    return distinct(names), logs


def log_by_name(funcs: Sequence[Callable]) -> bool:
    """Whether a function asks for `log_metric` by its name: what it will log need not be there at its first call."""
    return any("log_metric" in inspect.signature(func).parameters for func in funcs if inspect.isfunction(func))


def distinct(names: Sequence[str]) -> list[str]:
    """The same names, `_2` and so on behind those that were taken already."""
    taken: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.append(candidate)
    return taken


def arguments_of(func: Callable, name: str, given: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """Those of `given` that `func` accepts, copied: no function can change what another one, or the run, sees.

    Args:
        name: of the function, for people.
        columns: the data's own, which are among `given`.

    Raises:
        UserError: it asks for something that is not given.
    """
    parameters = inspect.signature(func).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = [p.name for p in parameters if p.name in named and p.default is p.empty]
    if missing := [parameter for parameter in required if parameter not in given]:
        raise UserError(
            f"the reward function {name!r} needs {', '.join(map(repr, missing))}, which the data lacks; columns found: "
            f"{', '.join(sorted(columns)) or 'none'} (rename one in the data, or name it with --answer-column)."
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = given if takes_all else {key: value for key, value in given.items() if key in named}
    return {key: own(value) for key, value in accepted.items()}


def own(value: Any) -> Any:
    """A copy of lists, dictionaries, tensors and arrays down to what is in them."""
    # In C: a batch has some hundred thousand token ids.
    if isinstance(value, (list, tuple)) and _ATOMS.issuperset(map(type, value)):
        return type(value)(value) if type(value) in (list, tuple) else copy.copy(value)
    if type(value) in (list, tuple):
        return type(value)(own(item) for item in value)
    if type(value) is dict:
        if _ATOMS.issuperset(map(type, value.values())):
            return value.copy()
        return {key: own(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def check_columns(funcs: Sequence[Any], columns: Sequence[str]) -> None:
    """Whether the data has what each function asks for by name. Models, and names of models, need only the texts.

    Raises:
        UserError: a column is missing; as in the first call, but before a model is loaded.
    """
    lists: dict[str, Any] = {name: [] for name in columns}
    given = {name: [] for name in ("prompts", "completions", "completion_ids")} | lists
    given |= dict.fromkeys(("trainer_state", "log_extra", "log_metric"))
    for func in funcs:
        func = known(func)
        if isinstance(func, (str, torch.nn.Module)) or not callable(func):
            continue
        try:
            arguments = arguments_of(func, name_of(func), given, lists)
        except UserError:
            raise
        except ValueError:  # a function in C without a signature
            continue
        if func in BUILTIN.values():
            func(**arguments)  # `accuracy` takes either of two columns, which its signature can't say
