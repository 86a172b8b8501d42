"""Environments that a model acts in, as TRL 1.16 has them: one for each completion, with methods that are tools.

`reset(**row)` is called before each rollout; a text that it returns, or a list of text parts, is put behind the last
message of the prompt, which is empty where the data have no prompts. An environment with `get_reward()` is a reward of
its own, of weight 1, under the name of its class. Instances are made once and reset often. With a dict of factories the
data's column `environment` says which a row uses, and only its tools are in that row's prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lowvram_grpo.data.messages import joined
from lowvram_grpo.data.streams import first_rows, is_stream
from lowvram_grpo.data.tool_calls import is_async
from lowvram_grpo.errors import Terminated, UserError, one_line
from lowvram_grpo.training.tool_loop import named_tools

Factory = Callable[[], Any]
_NO_TOOLS = ("reset", "get_reward")
COLUMN = "environment"
# For a `reset` to write into.
EMPTY_PROMPT = [{"role": "user", "content": ""}]


class Shared(list):
    """Objects that rewards get as they are: copies of environments would not be the ones that were acted in."""

    def __deepcopy__(self, memo: dict) -> Shared:
        return self


class Environments:
    """
    Args:
        factory: makes an instance; or such by name.
        tools: that go with every environment.

    Raises:
        UserError: an environment can't be made, or has no `reset`.
    """

    def __init__(self, factory: Factory | dict[str, Factory], tools: Sequence[Callable]):
        self.several = isinstance(factory, dict)
        self.factories: dict[str | None, Factory] = dict(factory) if self.several else {None: factory}
        self.tools, self._writes_prompts = list(tools), False
        self._pool = {name: [_made(make)] for name, make in self.factories.items()}
        for name, (instance,) in self._pool.items():
            if not callable(getattr(instance, "reset", None)):
                named = "" if name is None else f" of {name!r}"
                raise UserError(f"The environment{named} has no method `reset`; add one, it may do nothing.")

    def tools_of(self, name: str | None) -> list[Callable]:
        """Those that a prompt of this environment tells of."""
        return [*self.tools, *_methods(self._pool[name][0])]

    def all_tools(self) -> list[Callable]:
        return [*self.tools, *(method for pool in self._pool.values() for method in _methods(pool[0]))]

    def name_of(self, row: dict[str, Any]) -> str | None:
        """Raises:
        UserError: the row names none that there is."""
        if not self.several:
            return None
        name = row.get(COLUMN)
        if name not in self.factories:
            raise UserError(
                f"A row has environment {name!r}, and environment_factory has {', '.join(map(repr, self.factories))}; "
                f"give each row one of these in a column {COLUMN!r}."
            )
        return name

    def prompted(self, train: Any, evaluated: Any) -> tuple[Any, Any]:
        """Data with empty prompts where the training data have none: every `reset` writes its own, and is not told of
        what only holds the place of one. Data of other kinds, which are refused later, stay as they are."""
        if _lacks_prompts(train):
            self._writes_prompts = True
            train = _with_empty_prompts(train)
            if isinstance(evaluated, dict):
                evaluated = {name: _with_empty_prompts(part) for name, part in evaluated.items()}
            else:
                evaluated = _with_empty_prompts(evaluated)
        return train, evaluated

    def begin(self, rows: Sequence[dict[str, Any]]) -> tuple[list[list[dict]], list[Any], list[dict[str, Callable]]]:
        """Prompts with what `reset` said, an instance and its tools by name, for each of `rows`, one a completion.

        Raises:
            UserError: a `reset` failed.
        """
        used: dict[str | None, int] = {}
        prompts, instances, tools = [], [], []
        for row in rows:
            name = self.name_of(row)
            pool, at = self._pool[name], used.get(name, 0)
            used[name] = at + 1
            if at == len(pool):
                pool.append(_made(self.factories[name]))
            instance = pool[at]
            kept_back = {COLUMN} if self.several else set()
            kept_back |= {"prompt"} if self._writes_prompts else set()
            given = {key: value for key, value in row.items() if key not in kept_back}
            prompts.append(_with(row["prompt"], _reset(instance, given)))
            instances.append(instance)
            tools.append(named_tools([*self.tools, *_methods(instance)]))
        return prompts, instances, tools

    def rewards(self) -> list[Callable]:
        """A reward function for each class of environment that has `get_reward`; None for completions of another."""
        kinds = {type(pool[0]): None for pool in self._pool.values() if callable(getattr(pool[0], "get_reward", None))}
        return [_reward_of(kind) for kind in kinds]


def _reward_of(kind: type) -> Callable:
    if is_async(kind.get_reward):

        async def reward(environments, **kwargs):
            return [await one.get_reward() if type(one) is kind else None for one in environments]

    else:

        def reward(environments, **kwargs):
            return [one.get_reward() if type(one) is kind else None for one in environments]

    reward.__name__ = kind.__name__
    return reward


def _made(make: Factory) -> Any:
    try:
        return make()
    except Terminated:
        raise
    except Exception as error:
        raise UserError(f"environment_factory failed ({type(error).__name__}: {one_line(error)}).") from error


def _reset(instance: Any, row: dict[str, Any]) -> str | None:
    try:
        said = instance.reset(**row)
    except Terminated:
        raise
    except Exception as error:
        raise UserError(
            f"reset of the environment {type(instance).__name__} failed ({type(error).__name__}: {one_line(error)}); "
            "it gets the columns of the row as keyword arguments, so let it take **kwargs."
        ) from error
    try:
        text = joined(said)
    except ValueError as error:
        raise UserError(f"What reset of the environment {type(instance).__name__} returned {error}.") from error
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"reset of the environment {type(instance).__name__} returned a {type(said).__name__}; return None or a "
            "text, which is put behind the last message of the prompt."
        )
    return text


def _with(prompt: list[dict], said: str | None) -> list[dict]:
    if said is None:
        return prompt
    try:
        before = joined(prompt[-1]["content"])
    except ValueError as error:
        raise UserError(f"A prompt {error}.") from error
    return [*prompt[:-1], {**prompt[-1], "content": f"{before}{said}"}]


def _lacks_prompts(data: Any) -> bool:
    """Of a dataset, or a stream of one."""
    columns = getattr(data, "column_names", None)
    if columns is None and is_stream(data):
        columns = next(iter(first_rows(data, 1)), {"prompt": None})
    return isinstance(columns, (list, dict)) and bool(columns) and "prompt" not in columns


def _with_empty_prompts(data: Any) -> Any:
    if not _lacks_prompts(data):
        return data
    if is_stream(data):
        return data.map(_emptily_prompted) if hasattr(data, "map") else data
    return data.add_column("prompt", [EMPTY_PROMPT] * len(data)) if hasattr(data, "add_column") else data


def _emptily_prompted(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "prompt": [dict(message) for message in EMPTY_PROMPT]}


def _methods(instance: Any) -> list[Callable]:
    """Public methods, in the order of their names; of the class, for asking an instance would evaluate properties."""
    names = [name for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]
    return [getattr(instance, name) for name in names if not name.startswith("_") and name not in _NO_TOOLS]
