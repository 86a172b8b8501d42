"""From what a person writes after `--tools` and `--environment` to functions and a class. It is the person's own code,
which runs in the process that trains, with all that this may do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.tool_calls import schemas_of
from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.rewards.registry import load_file, public_functions
from lowvram_grpo.training.agents import Agents, agents_of

if TYPE_CHECKING:
    from lowvram_grpo.recipe.resolve import Recipe


@dataclass(frozen=True)
class Acting:
    """What a recipe lets the model do beside answering, as GRPOTrainer takes it.

    Attributes:
        agents: the same, to look at before there is a trainer; None where it may do nothing.
    """

    tools: list[Callable]
    environment: Callable[[], Any] | None
    agents: Agents | None

    @property
    def judges(self) -> bool:
        """Whether the environment is a reward of its own."""
        return self.environment is not None and callable(getattr(self.environment, "get_reward", None))


def acting_of(recipe: Recipe) -> Acting:
    """Raises:
    UserError: there is no such file, function or class, or one that can't be described to a model."""
    tools = [tool for spec in recipe.tools for tool in _tools_of(spec)]
    environment = None if recipe.environment is None else _environment_of(recipe.environment)
    iterations = recipe.training.get("max_tool_calling_iterations")
    return Acting(tools, environment, agents_of(tools, environment, None, iterations))


def _parted(spec: str, what: str) -> tuple[str, list[str]]:
    r"""(file, names behind its colon); that of a Windows drive (`C:\`) is none."""
    file, colon, names = spec.strip().rpartition(":")
    if not colon or (len(file) == 1 and names[:1] in ("\\", "/")):
        file, names = spec.strip(), ""
    if not file.endswith(".py"):
        raise UserError(f"{what} {spec!r} is no Python file; write path/to/file.py or path/to/file.py:NAME.")
    return file, [name.strip() for name in names.split(",") if name.strip()]


def _tools_of(spec: str) -> list[Callable]:
    file, asked = _parted(spec, "--tools")
    module = load_file(file, "tool")
    there = public_functions(module)
    for name in asked:
        if not callable(getattr(module, name, None)):
            raise UserError(
                f"the tool file {file!r} has no function {name!r}{did_you_mean(name, there)}; functions found: "
                f"{', '.join(there) or 'none'}."
            )
    if not asked and not there:
        raise UserError(f"the tool file {file!r} defines no public function; write one, or name it behind a colon.")
    tools = [getattr(module, name) for name in asked or there]
    try:
        schemas_of(tools)
    except UserError as error:
        others = "" if asked or len(tools) == 1 else f" If it is none, name those that are: {file}:{','.join(there)}."
        raise UserError(f"{error}{others}") from error
    return tools


def _environment_of(spec: str) -> Callable[[], Any]:
    file, asked = _parted(spec, "--environment")
    module = load_file(file, "environment")
    if len(asked) > 1:
        raise UserError(f"--environment takes one class, and {spec!r} names {len(asked)}; write {file}:{asked[0]}.")
    there = _classes(module)
    if not asked and len(there) != 1:
        raise UserError(
            f"the environment file {file!r} defines {len(there)} classes with a method `reset` "
            f"({', '.join(there) or 'none'}); write {file}:NAME."
        )
    name = (asked or there)[0]
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(
            f"the environment file {file!r} has no class {name!r}{did_you_mean(name, there)}; classes found: "
            f"{', '.join(there) or 'none'}."
        )
    return found


def _classes(module: ModuleType) -> list[str]:
    own = inspect.getmembers(module, lambda m: inspect.isclass(m) and m.__module__ == module.__name__)
    return [name for name, kind in own if not name.startswith("_") and callable(getattr(kind, "reset", None))]
