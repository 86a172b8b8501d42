"""Forwards of single modules, put in the place of their class's for as long as the model lives.

They change neither parameters nor state dicts; deepcopy and pickle bind them to the copy. Whoever else gives a module a
forward of its own (accelerate's hooks, a rollout for its length) comes on top.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

_MARK = "_lowvram_stands_in"


def stands_in(forward: Callable) -> Callable:
    """Marks a function `forward(self, ...)` that computes what the class's own does."""
    setattr(forward, _MARK, True)
    return forward


def bound(forward: Callable, module: nn.Module) -> Callable:
    """Not a bound method: pickle would look for that by its name among those of the module's class."""
    return partial(forward, module)


def give_forward(module: nn.Module, forward: Callable, name: str = "forward") -> None:
    """`forward` was marked by `stands_in`."""
    vars(module)[name] = bound(forward, module)


def has_foreign_forward(module: nn.Module, name: str = "forward") -> bool:
    """Whether somebody else has given this very module a forward, which it would be wrong to go past."""
    own = vars(module).get(name)
    # Of the function alone: who wraps a forward (functools.wraps) takes over whatever hangs on it.
    return own is not None and not getattr(getattr(own, "func", None), _MARK, False)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has put hooks on a module, which only a call of the module itself runs."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
