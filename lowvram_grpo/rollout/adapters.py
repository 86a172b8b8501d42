"""LoRA layers that cost less while sampling: two small products a layer, or none.

With one token a row, a decode step is bound by how many operators it launches and how many weights it reads. peft's
layer takes up to six operators beside the base layer's product: casts, two products, a multiplication, an addition.
Here, for the length of a rollout:

* **fused**: `y = base(x)`, then `y += (x A^T) (s B)^T` in place by one product that adds. A and s B are cast once.
  Layers that read the same tensor (q, k and v; gate and up) share one product with their stacked A.
* **merged**: `W += s B A` in an unquantized base weight, whose old bits wait in host memory and come back as they were.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import counted_as
from lowvram_grpo.policy.fused_lora import forget_copies
from lowvram_grpo.policy.plain_lora import PlainLora, has_plain_base, plain_groups

MODES = ("auto", "fused", "merged", "off")

_TILE = 2**22  # entries of a weight that are merged at once: 16 MiB in float32
_CHUNK = 2**25  # bytes; the allocator of pinned memory rounds each request up to a power of two


@contextmanager
def fast_adapters(model: nn.Module, mode: str = "auto") -> Iterator[None]:
    """Inside the block the model's LoRA layers do the same with less work; afterwards they are as before.

    To be entered under torch.no_grad() with the model in eval mode, inside of autocast if there is one. The active
    adapter's weights are read on entry: neither train nor switch adapters inside the block. A CUDA graph captured
    inside reads buffers that are freed at its end, so it must not outlive the block. Fused layers take peft's own way
    when gradients are enabled. What `policy.fused_lora` keeps for training passes is let go.

    Touched are LoRA layers on linear layers (bitsandbytes' 4-bit and 8-bit ones too) that are plain: one active
    adapter, not merged, not disabled, no variant such as DoRA, no bias of its own, no dropout in force. Everything
    else stays as it is, and so do lm_head and modules that appear in several places.

    Args:
        model: with or without a PeftModel around it.
        mode: `fused`; `merged` (layers whose base is quantized, or whose weight something else reads too, are fused);
            `off`; `auto`, which is `fused`.

    `auto` never merges. A step of 8 rows on a CPU takes 0.89 to 0.96 of peft's time fused and 0.65 to 0.89 merged
    (SmolLM2-135M and MiniMind2-small, r = 16), but in 16 bits W + s B A is rounded to the dtype of W, and an adapter
    that has learned little falls below its last bit: with B of 3e-4 in size, 4 % of SmolLM2's bfloat16 weights change
    at all, and the log-probs are as far from the adapter's as if there were none. In float32 merging rounds nothing
    away, and costs as many bytes of host memory as the merged weights have (pinned on CUDA) and two copies of them.

    Raises:
        UserError: no such mode.
    """
    if mode not in MODES:
        raise UserError(f"The mode for adapters while sampling is {mode!r}; it must be one of {', '.join(MODES)}.")
    with ExitStack() as undo:
        if mode != "off":
            forget_copies(model)
            with torch.no_grad(), counted_as("adapter"):
                groups = plain_groups(model)
                if mode == "merged":
                    groups = _merge_all(model, groups, undo)
                _fuse_all(model, groups, undo)
        yield


def _replace_forward(layer: nn.Module, forward: Callable[..., Tensor], undo: ExitStack) -> None:
    own = vars(layer)
    undo.callback(own.update, forward=own["forward"]) if "forward" in own else undo.callback(own.pop, "forward", None)
    layer.forward = forward


# Fused


class _Group:
    """A^T of layers that may share their input, side by side.

    Args:
        weights: A (r_i, H) of each, any dtype.
    """

    def __init__(self, weights: list[Tensor], dtype: torch.dtype):
        self.stacked = torch.cat([a.T.to(dtype) for a in weights], 1)
        ends = [0]
        for a in weights:
            ends.append(ends[-1] + len(a))
        self.columns = [slice(first, last) for first, last in pairwise(ends)]


class _LastProduct:
    """x A^T of the group that was asked last, until each of its layers has had its part or x is gone.

    There is one for the model, whose layers run one after another, so that at most one product is ever held.
    """

    def __init__(self):
        self._group: _Group | None = None
        self._x: weakref.ref | None = None
        self._product: Tensor | None = None
        self._waiting: set[int] = set()

    def _forget(self, gone: weakref.ref | None = None) -> None:
        if gone is None or gone is self._x:  # the end of an older x is not that of a newer one's product
            self._group = self._x = self._product = None

    def part(self, group: _Group, i: int, x: Tensor) -> Tensor:
        """(N, r_i): x (..., H) times the group's i-th A^T."""
        columns = group.columns[i]
        if len(group.columns) == 1:
            return _rows_product(x, group.stacked)
        if self._group is group and i in self._waiting:
            if self._x() is not x:  # not the sibling's input: whoever else waits may still ask for that
                return _rows_product(x, group.stacked[:, columns])
            product = self._product
            self._waiting.discard(i)
            if not self._waiting:
                self._forget()
            return product[:, columns]
        self._forget()
        product = _rows_product(x, group.stacked)
        self._group, self._x, self._product = group, weakref.ref(x, self._forget), product
        self._waiting = set(range(len(group.columns))) - {i}
        return product[:, columns]


def _rows_product(x: Tensor, at: Tensor) -> Tensor:
    return torch.mm(x.reshape(-1, x.shape[-1]).to(at.dtype), at)


def _fuse_all(model: nn.Module, groups: list[list[PlainLora]], undo: ExitStack) -> None:
    # What a model with a quantized base computes in.
    floats = (p.dtype for name, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in name)
    model_dtype = next(floats, torch.float32)
    last = _LastProduct()
    undo.callback(last._forget)
    for loras in groups:
        weight = loras[0].layer.base_layer.weight
        kind = weight.device.type
        if kind == "meta":  # where autocast does not count: it is what a GPU's would be
            dtype = weight.dtype if has_plain_base(loras[0].layer) else model_dtype
        else:  # what training computes the adapter in
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else loras[0].a.dtype
        group = _Group([lora.a for lora in loras], dtype)
        for i, lora in enumerate(loras):
            # Laid out by rows: for a few rows of input that is the faster of the two on a CPU.
            bt = (lora.b * lora.scaling).T.to(dtype).contiguous()
            _replace_forward(lora.layer, _fused_forward(lora.layer, last, group, i, bt), undo)


def _fused_forward(layer: nn.Module, last: _LastProduct, group: _Group, i: int, bt: Tensor) -> Callable[..., Tensor]:
    """`bt`: (r, O), scaled."""
    base, slow = layer.base_layer, type(layer).forward

    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or torch.is_grad_enabled():
            return slow(layer, x, *args, **kwargs)
        z = last.part(group, i, x)
        y = base(x)
        if y.dtype == z.dtype == bt.dtype and y.is_contiguous():
            y.view(-1, bt.shape[1]).addmm_(z, bt)
            return y
        # Autocast on meta tensors, or a base that answers in another dtype than it computes in.
        return y.add_(torch.mm(z.to(bt.dtype), bt).view(y.shape))

    return forward


# Merged


class _HostBytes:
    """Copies of weights in host memory, pinned where they come from a GPU, packed into chunks.

    Args:
        size: bytes that will be kept in all.
    """

    def __init__(self, size: int):
        self._left, self._chunk, self._used = size, torch.empty(0, dtype=torch.uint8), 0

    def keep(self, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(place in the weight, its bytes): copying each back restores the weight bit for bit. None on meta."""
        pieces = []
        rest = weight.detach().view(-1).view(torch.uint8)
        while len(rest) and not weight.is_meta:
            if self._used == len(self._chunk):
                room = min(_CHUNK, self._left)
                self._chunk, self._used = torch.empty(room, dtype=torch.uint8, pin_memory=weight.is_cuda), 0
            kept = self._chunk[self._used : self._used + len(rest)]
            place, rest = rest[: len(kept)], rest[len(kept) :]
            kept.copy_(place, non_blocking=True)
            self._used, self._left = self._used + len(kept), self._left - len(kept)
            pieces.append((place, kept))
        return pieces


def _restore(pieces: list[tuple[Tensor, Tensor]]) -> None:
    for place, kept in pieces:
        place.copy_(kept, non_blocking=True)


def _merge_all(model: nn.Module, groups: list[list[PlainLora]], undo: ExitStack) -> list[list[PlainLora]]:
    """Merge what can be; the other layers, in groups."""
    tensors = (t for m in model.modules() for t in [*m._parameters.values(), *m._buffers.values()] if t is not None)
    readers = Counter(t.untyped_storage()._cdata for t in tensors)

    def can(layer: nn.Module) -> bool:
        weight = layer.base_layer.weight
        alone = readers[weight.untyped_storage()._cdata] == 1
        return has_plain_base(layer) and alone and weight.is_floating_point() and weight.is_contiguous()

    chosen = {lora for loras in groups for lora in loras if can(lora.layer)}
    host = _HostBytes(sum(lora.layer.base_layer.weight.nbytes for lora in chosen))
    for lora in (lora for loras in groups for lora in loras if lora in chosen):
        weight = lora.layer.base_layer.weight
        undo.callback(_restore, host.keep(weight))
        _merge(weight, lora.a, lora.b, lora.scaling)
        _replace_forward(lora.layer, _merged_forward(lora.layer.base_layer), undo)
    return [rest for loras in groups if (rest := [lora for lora in loras if lora not in chosen])]


def _merged_forward(base: nn.Module) -> Callable[..., Tensor]:
    return lambda x, *args, **kwargs: base(x, *args, **kwargs)


def _merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """weight (O, I) += scaling b (O, r) a (r, I): the sum is formed in float32 at least and rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, _TILE // weight.shape[1])
    a = a.to(dtype)
    for first in range(0, len(weight), rows):
        tile = weight[first : first + rows]
        # In place, also where `to` copied nothing, for autocast leaves it alone.
        tile.copy_(tile.to(dtype).addmm_(b[first : first + rows].to(dtype) * scaling, a))
