"""Rotary positions in one launch: transformers' functions for them, replaced in the modules whose attention looks them
up, while a model samples or is trained."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.kernels.layer import gradients as layer_gradients
from lowvram_grpo.kernels.layer.ops import rope, rope_ref
from lowvram_grpo.policy.own_forward import same_bits
from lowvram_grpo.policy.trials import random_numbers

_ROPE = "apply_rotary_pos_emb"


class _Rope:
    """What stands in for an architecture's function as long as somebody wants it: blocks in which a model samples, and
    models that are trained.

    An attention's forward looks its function up among the globals of the file it is written in: there it is replaced.
    Subclassing or rewriting forward would repeat transformers' code for each architecture.

    Args:
        place: those globals.
        partial: the original, too, turns only a part of each head where its tables are narrower.
    """

    def __init__(self, place: dict[str, Any], original: Callable, partial: bool):
        self.place, self.original, self.partial, self.users = place, original, partial, Counter()

    def enter(self, user: str) -> None:
        self.users[user] += 1
        self.place[_ROPE] = self

    def leave(self, user: str) -> None:
        self.users[user] -= 1
        if not self.users.total() and self.place.get(_ROPE) is self:
            self.place[_ROPE] = self.original

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        usual = q.ndim == k.ndim == 4 and cos.ndim == 3 and (self.partial or cos.shape[-1] == q.shape[-1])
        if not args and not kwargs and usual:
            if self.users["training"]:
                return layer_gradients.rope(q, k, cos, sin)
            if not torch.is_grad_enabled():
                return rope(q, k, cos, sin)
        return self.original(q, k, cos, sin, *args, **kwargs)


def _ropes(model: nn.Module) -> Iterator[_Rope]:
    """One for each of the model's functions that `rope` can stand in for."""
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith("Attention")}
    places = {id(g): g for g in (inspect.unwrap(kind.forward).__globals__ for kind in kinds) if _ROPE in g}
    for place in places.values():
        there = place[_ROPE]
        if isinstance(there, _Rope):
            yield there
        elif _same_rotation(there, 8):
            yield _Rope(place, there, partial=_same_rotation(there, 6))


def replace_ropes(model: nn.Module, undo: ExitStack) -> int:
    """Have the model's rotary functions sample by the kernel until `undo` is unwound; how many there are."""
    found = list(_ropes(model))
    for each in found:
        each.enter("sampling")
        undo.callback(each.leave, "sampling")
    return len(found)


def give_ropes(model: nn.Module) -> int:
    """Have the model's rotary functions train by the kernel from now on; how many there are."""
    found = list(_ropes(model))
    for each in found:
        each.enter("training")
        weakref.finalize(model, each.leave, "training").atexit = False
    return len(found)


def _same_rotation(original: Callable, d: int) -> bool:
    """Whether `original` is `rope` on heads of 8, of which d entries are turned. Random tables, whose halves differ."""
    for q_dtype, dtype in product((torch.float32, torch.bfloat16), repeat=2):
        q, k = random_numbers(2, 4, 3, 8, seed=6).to(q_dtype), random_numbers(2, 2, 3, 8, seed=7).to(q_dtype)
        cos, sin = random_numbers(2, 3, d, seed=8).to(dtype), random_numbers(2, 3, d, seed=9).to(dtype)
        if not same_bits(partial(original, q, k, cos, sin), partial(rope_ref, q, k, cos, sin)):
            return False
    return True
