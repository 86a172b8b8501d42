"""LoRA layers that share an input, as one autograd function:

    z = s x A^T    all siblings' A stacked, one product
    y = x W^T + z B^T    the second product adds in place
    dz = s dy B,   dA = dz^T x (one product),   dB = dy^T z,   dx = dy W + dz A (added up in place)

Gradients of float32 factors are accumulated and given back in float32. x and z (tokens, rank) are kept for the backward
pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowvram_grpo.policy.frozen_base import add_product, product, product_back
from lowvram_grpo.policy.lora_factors import Block, FactorCache, Factors, LoraGroup
from lowvram_grpo.policy.plain_lora import PlainLora


class LoraCall(NamedTuple):
    """Layers of a group that are computed together, by their places in it, and the adapter that acts in them.

    Attributes:
        kernel: see `frozen_base.product`.
    """

    group: LoraGroup
    members: list[int]
    loras: list[PlainLora]
    dtype: torch.dtype
    cache: FactorCache
    kernel: bool

    @property
    def bases(self) -> list[nn.Module]:
        return [self.group.layers[m].base_layer for m in self.members]

    def factors(self) -> Factors:
        """Of these layers alone."""
        found = self.cache.factors(self.group, self.loras, self.dtype)
        if len(self.members) == len(self.group.layers):
            return found
        (m,) = self.members
        own, width = found.columns[m], found.b[m].shape[1]
        block = next(x for x in found.blocks if x.columns.start <= own.start < x.columns.stop)
        first = own.start - block.columns.start
        block = Block(block.a[first : first + width], slice(0, width), block.scaling)
        return Factors([block], [found.b[m]], [slice(0, width)])


def lora_products(call: LoraCall, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of each layer y (..., O), and z (N, R), scaled; without a graph."""
    blocks, bs, columns = call.factors()
    low = x.reshape(-1, x.shape[-1]).to(call.dtype)
    z = low.new_empty(len(low), columns[-1].stop)
    for a, part, s in blocks:
        z[:, part].addmm_(low, a.T, beta=0, alpha=s)
    outputs = []
    for base, b, part in zip(call.bases, bs, columns):
        y = product(base, x, call.kernel).contiguous()
        add_product(y.view(-1, len(b)), z[:, part], b.T)
        outputs.append(y)
    return outputs, z


class LoraProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: LoraCall, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        outputs, z = lora_products(call, x)
        ctx.save_for_backward(x, z)
        ctx.call, ctx.dtypes = call, [weight.dtype for weight in weights]
        ctx.autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple:
        x, z = ctx.saved_tensors  # which computes a checkpointed layer again
        call, dtype = ctx.call, ctx.call.dtype
        (blocks, bs, columns), dx, dz = call.factors(), None, torch.empty_like(z)
        want_x, wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        das, dbs = [None] * len(bs), [None] * len(bs)
        scaling = {column: s for _, part, s in blocks for column in range(part.start, part.stop)}
        for i, (base, b, part, dy) in enumerate(zip(call.bases, bs, columns, dys)):
            if dy is None:
                dz[:, part].zero_()
                continue
            dy = dy.reshape(-1, len(b))
            if want_x:
                base_dtype = dtype if ctx.autocast else base.weight.dtype
                base_dtype = (base.compute_dtype or x.dtype) if hasattr(base, "compute_dtype") else base_dtype
                dx = product_back(base, dy.to(base_dtype), call.kernel, dx)
            dy = dy.to(dtype)
            dz[:, part].addmm_(dy, b, beta=0, alpha=scaling[part.start])
            if wanted[2 * i + 1]:
                dbs[i] = _mm_in(dy.T, z[:, part], ctx.dtypes[2 * i + 1])
        low = x.reshape(-1, x.shape[-1]).to(dtype)
        for a, part, _ in blocks:
            if dx is not None:
                add_product(dx, dz[:, part], a)
            inside = [i for i, own in enumerate(columns) if part.start <= own.start < part.stop and wanted[2 * i]]
            if inside:
                da = _mm_in(dz[:, part].T, low, ctx.dtypes[0])
                for i in inside:
                    das[i] = da[columns[i].start - part.start : columns[i].stop - part.start]
        dx = None if dx is None else dx.to(x.dtype).view(x.shape)
        call.cache.release(call.group)
        return None, dx, *(grad for pair in zip(das, dbs) for grad in pair)


def _mm_in(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, accumulated in float32 and, on CUDA, never rounded to fewer bits on the way."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and dtype == torch.float32:
        return torch.ops.aten.mm.dtype(a, b, dtype)
    return torch.mm(a, b).to(dtype)
