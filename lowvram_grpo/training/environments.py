"""Environments that a model acts in, as TRL 1.16 has them: one for each completion, with methods that are tools.

`reset(**row)` is called before each rollout; a text that it returns is put behind the last message of the prompt. An
environment with `get_reward()` is a reward of its own, of weight 1, under the name of its class. Instances are made
once and reset often. With a dict of factories the data's column `environment` says which a row uses, and only its tools
are in that row's prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lowvram_grpo.data.tool_calls import is_async
from lowvram_grpo.errors import Terminated, UserError, one_line
from lowvram_grpo.training.tool_loop import named_tools

Factory = Callable[[], Any]
_NO_TOOLS = ("reset", "get_reward")
COLUMN = "environment"


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
        self.tools = list(tools)
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
            given = {key: value for key, value in row.items() if not (self.several and key == COLUMN)}
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
    if said is not None and not isinstance(said, str):
        raise UserError(
            f"reset of the environment {type(instance).__name__} returned a {type(said).__name__}; return None or a "
            "text, which is put behind the last message of the prompt."
        )
    return said


def _with(prompt: list[dict], said: str | None) -> list[dict]:
    if said is None:
        return prompt
    return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}{said}"}]


def _methods(instance: Any) -> list[Callable]:
    """Public methods, in the order of their names; of the class, for asking an instance would evaluate properties."""
    names = [name for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]
    return [getattr(instance, name) for name in names if not name.startswith("_") and name not in _NO_TOOLS]
