"""Forwards of single modules, put in the place of their class's for as long as the model lives, or for a block.

They change neither parameters nor state dicts; deepcopy and pickle bind them to the copy. Whoever else gives a module a
forward of its own (accelerate's hooks, a rollout for its length) comes on top.

What may be replaced is known by what it computes, not by a list of architectures: see `same_bits`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import is_out_of_memory

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


def replace_forward(module: nn.Module, name: str, forward: Callable[..., Tensor], undo: ExitStack) -> None:
    """Until `undo` is unwound."""
    own = vars(module)
    undo.callback(own.update, {name: own[name]}) if name in own else undo.callback(own.pop, name, None)
    own[name] = forward


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


def same_bits(original: Callable[[], Any], ours: Callable[[], Any]) -> bool:
    """Whether two computations give the same bits in the same dtype. An original that fails agrees with nothing."""
    try:
        pairs = zip(_tensors(original()), _tensors(ours()), strict=True)
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)
