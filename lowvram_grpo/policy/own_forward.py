"""Forwards of single modules, put in the place of their class's for as long as the model lives.

They are bound methods, which deepcopy binds to the copy, and change neither parameters nor state dicts. Whoever else
gives a module a forward of its own (accelerate's hooks, a rollout for its length) comes on top.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

from torch import nn

_MARK = "_lowvram_stands_in"


def stands_in(forward: Callable) -> Callable:
    """Marks a function `forward(self, ...)` that computes what the class's own does."""
    setattr(forward, _MARK, True)
    return forward


def give_forward(module: nn.Module, forward: Callable, name: str = "forward") -> None:
    """`forward` was marked by `stands_in`."""
    vars(module)[name] = MethodType(forward, module)


def has_foreign_forward(module: nn.Module, name: str = "forward") -> bool:
    """Whether somebody else has given this very module a forward, which it would be wrong to go past."""
    own = vars(module).get(name)
    return own is not None and not getattr(own, _MARK, False)
