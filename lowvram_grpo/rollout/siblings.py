"""What layers that are given the same tensor (q, k and v; gate and up) compute together, at the first one's call."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from lowvram_grpo.kernels.decode import small_product as kernel
from lowvram_grpo.kernels.decode.small_product import MOST_ROWS, FourBit, Sibling, small_product
from lowvram_grpo.policy.plain_lora import PlainLora, has_plain_base
from lowvram_grpo.policy.trials import runs, wanted


class Together(Protocol):
    """Layers that may share their input, and what is computed of it for all of them."""

    count: int

    def all(self, x: Tensor) -> list[Tensor]:
        """Each layer's part."""

    def alone(self, i: int, x: Tensor) -> Tensor:
        """That of layer i, by itself."""


class LastShared:
    """What the group that was asked last computed of x, until each of its layers has had its part or x is gone.

    There is one for the model, whose layers run one after another, so that at most one group's is ever held.
    """

    def __init__(self):
        self._group: Together | None = None
        self._x: weakref.ref | None = None
        self._parts: dict[int, Tensor] = {}

    def forget(self, gone: weakref.ref | None = None) -> None:
        if gone is None or gone is self._x:  # the end of an older x is not that of a newer one's parts
            self._group = self._x = None
            self._parts = {}

    def part(self, group: Together, i: int, x: Tensor) -> Tensor:
        """The group's i-th of x."""
        if group.count == 1:
            return group.alone(i, x)
        if self._group is group and i in self._parts:
            if self._x() is not x:  # not the sibling's input: whoever else waits may still ask for that
                return group.alone(i, x)
            found = self._parts.pop(i)
            if not self._parts:
                self.forget()
            return found
        self.forget()
        parts = group.all(x)
        self._group, self._x = group, weakref.ref(x, self.forget)
        self._parts = {j: part for j, part in enumerate(parts) if j != i}
        return parts[i]


class Downs:
    """A^T of layers that may share their input, side by side; a part is (N, r_i).

    Args:
        weights: A (r_i, H) of each, any dtype.
    """

    def __init__(self, weights: list[Tensor], dtype: torch.dtype):
        self.count = len(weights)
        self.stacked = torch.cat([a.T.to(dtype) for a in weights], 1)
        ends = [0]
        for a in weights:
            ends.append(ends[-1] + len(a))
        self.columns = [slice(first, last) for first, last in pairwise(ends)]

    def all(self, x: Tensor) -> list[Tensor]:
        product = rows_product(x, self.stacked)
        return [product[:, columns] for columns in self.columns]

    def alone(self, i: int, x: Tensor) -> Tensor:
        return rows_product(x, self.stacked[:, self.columns[i]])


def rows_product(x: Tensor, at: Tensor) -> Tensor:
    return torch.mm(x.reshape(-1, x.shape[-1]).to(at.dtype), at)


class Products:
    """Whole layers, base product, bias and adapter, in one launch (and one for x A^T); a part is (..., O_i).

    Args:
        ups: scaled B^T (r_i, O_i), of the dtype of `downs`.
    """

    def __init__(self, siblings: list[Sibling], downs: Downs):
        self.count, self.siblings, self.downs = len(siblings), siblings, downs
        self.dtype = downs.stacked.dtype

    def take(self, x: Tensor) -> bool:
        """Whether x (..., H) is a few rows of the dtype that all of it is computed in."""
        return x.dtype == self.dtype and 0 < x.numel() <= MOST_ROWS * x.shape[-1]

    def all(self, x: Tensor) -> list[Tensor]:
        z = rows_product(x, self.downs.stacked)
        outs = small_product(x.reshape(-1, x.shape[-1]), self.siblings, z)
        return [out.view(*x.shape[:-1], -1) for out in outs]

    def alone(self, i: int, x: Tensor) -> Tensor:
        z = self.downs.alone(i, x)
        return small_product(x.reshape(-1, x.shape[-1]), [self.siblings[i]], z)[0].view(*x.shape[:-1], -1)


def products_of(loras: list[PlainLora], downs: Downs, ups: list[Tensor], fused_ops: str) -> Products | None:
    """None where the kernel is not asked for, does not know these layers, or does not run on their device."""
    dtype, device = downs.stacked.dtype, downs.stacked.device
    bases = [lora.layer.base_layer for lora in loras]
    kind = "dense_product" if has_plain_base(loras[0].layer) else "nf4_product"
    if device.type not in kernel.DEVICES or not wanted(kind, fused_ops):
        return None
    weights = [_weight(base, dtype) for base in bases]
    if any(weight is None for weight in weights):
        return None
    biases = [None if base.bias is None else base.bias.detach().to(dtype).contiguous() for base in bases]
    siblings = [Sibling(*layer) for layer in zip(weights, biases, ups)]
    if not kernel.fits(dtype, len(downs.stacked), siblings) or not runs(kind, device, dtype):
        return None
    return Products(siblings, downs)


def _weight(base: nn.Module, dtype: torch.dtype) -> Tensor | FourBit | None:
    """What the layer multiplies by, where it computes in `dtype` and answers in it."""
    if type(base) is nn.Linear:
        return base.weight.detach()
    state = getattr(base.weight, "quant_state", None)
    if state is None or getattr(base, "compute_dtype", None) not in (None, dtype):
        return None
    return FourBit.of(base.weight.detach(), state)
