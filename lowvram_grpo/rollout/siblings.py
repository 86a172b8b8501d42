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
from lowvram_grpo.policy.trials import passes_trial, wanted


class Siblings(Protocol):
    """Layers that may share their input, and what is computed of it for all of them."""

    count: int

    def compute_all(self, x: Tensor) -> list[Tensor]:
        """Each layer's output."""

    def compute_one(self, i: int, x: Tensor) -> Tensor:
        """That of layer i, by itself."""


class OutputCache:
    """What the siblings that were asked last computed of x, until each of them has had its output or x is gone.

    There is one for the model, whose layers run one after another, so that at most one group's outputs are ever held.
    """

    def __init__(self):
        self._siblings: Siblings | None = None
        self._x: weakref.ref | None = None
        self._outputs: dict[int, Tensor] = {}

    def forget(self, gone: weakref.ref | None = None) -> None:
        if gone is None or gone is self._x:  # the end of an older x is not that of a newer one's outputs
            self._siblings = self._x = None
            self._outputs = {}

    def get(self, siblings: Siblings, i: int, x: Tensor) -> Tensor:
        """The output of the i-th sibling."""
        if siblings.count == 1:
            return siblings.compute_one(i, x)
        if self._siblings is siblings and i in self._outputs:
            if self._x() is not x:  # not the sibling's input: whoever else waits may still ask for that
                return siblings.compute_one(i, x)
            found = self._outputs.pop(i)
            if not self._outputs:
                self.forget()
            return found
        self.forget()
        outputs = siblings.compute_all(x)
        self._siblings, self._x = siblings, weakref.ref(x, self.forget)
        self._outputs = {j: output for j, output in enumerate(outputs) if j != i}
        return outputs[i]


class StackedLoraA:
    """A^T of layers that may share their input, side by side; an output is (N, r_i).

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

    def compute_all(self, x: Tensor) -> list[Tensor]:
        product = _product(x, self.stacked)
        return [product[:, columns] for columns in self.columns]

    def compute_one(self, i: int, x: Tensor) -> Tensor:
        return _product(x, self.stacked[:, self.columns[i]])


def _product(x: Tensor, a_t: Tensor) -> Tensor:
    """(N, r) of x (..., H) and A^T (H, r)."""
    return torch.mm(x.reshape(-1, x.shape[-1]).to(a_t.dtype), a_t)


class FusedLinears:
    """Whole layers, base product, bias and adapter, in one launch (and one for x A^T); an output is (..., O_i).

    Args:
        layers: their B^T of the dtype of `lora_a`.
    """

    def __init__(self, layers: list[Sibling], lora_a: StackedLoraA):
        self.count, self.layers, self.lora_a = len(layers), layers, lora_a
        self.dtype = lora_a.stacked.dtype

    def accepts(self, x: Tensor) -> bool:
        """Whether x (..., H) is a few rows of the dtype that all of it is computed in."""
        return x.dtype == self.dtype and 0 < x.numel() <= MOST_ROWS * x.shape[-1]

    def compute_all(self, x: Tensor) -> list[Tensor]:
        z = _product(x, self.lora_a.stacked)
        outs = small_product(x.reshape(-1, x.shape[-1]), self.layers, z)
        return [out.view(*x.shape[:-1], -1) for out in outs]

    def compute_one(self, i: int, x: Tensor) -> Tensor:
        z = self.lora_a.compute_one(i, x)
        return small_product(x.reshape(-1, x.shape[-1]), [self.layers[i]], z)[0].view(*x.shape[:-1], -1)


def fused_linears(
    loras: list[PlainLora], lora_a: StackedLoraA, lora_b: list[Tensor], fused_ops: str
) -> FusedLinears | None:
    """None where the kernel is not asked for, does not know these layers, or does not run on their device.

    Args:
        lora_b: scaled B^T (r_i, O_i) of each, of the dtype of `lora_a`.
    """
    dtype, device = lora_a.stacked.dtype, lora_a.stacked.device
    bases = [lora.layer.base_layer for lora in loras]
    kind = "dense_product" if has_plain_base(loras[0].layer) else "nf4_product"
    if device.type not in kernel.DEVICES or not wanted(kind, fused_ops):
        return None
    weights = [_weight(base, dtype) for base in bases]
    if any(weight is None for weight in weights):
        return None
    biases = [None if base.bias is None else base.bias.detach().to(dtype).contiguous() for base in bases]
    layers = [Sibling(*layer) for layer in zip(weights, biases, lora_b)]
    if not kernel.fits(dtype, len(lora_a.stacked), layers) or not passes_trial(kind, device, dtype):
        return None
    return FusedLinears(layers, lora_a)


def _weight(base: nn.Module, dtype: torch.dtype) -> Tensor | FourBit | None:
    """What the layer multiplies by, where it computes in `dtype` and answers in it."""
    if type(base) is nn.Linear:
        return base.weight.detach()
    state = getattr(base.weight, "quant_state", None)
    if state is None or getattr(base, "compute_dtype", None) not in (None, dtype):
        return None
    return FourBit.of(base.weight.detach(), state)
