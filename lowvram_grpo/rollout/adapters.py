"""LoRA layers that cost less while sampling: two small products a layer, or none.

With one token a row, a decode step is bound by how many operators it launches and how many weights it reads. peft's
layer takes five operators beside the base layer's product: two casts, two products, a multiplication, an addition.
Here, for the length of a rollout:

* **fused**: `y = base(x)`, then `y += (x A^T) (s B)^T` in place by one product that adds. A and s B are cast once. Layers
  that read the same tensor (q, k and v; gate and up) share one product with their stacked A.
* **merged**: `W += s B A` in an unquantized base weight, whose old bits wait in host memory and come back as they were.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import counted_as
from lowvram_grpo.policy.wrapper import unwrap

MODES = ("auto", "fused", "merged", "off")

# By name, so that bitsandbytes need not be there. Exact types: a subclass may compute something else.
_LORA_LAYERS = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
}
_BASE_LAYERS = {
    ("torch.nn.modules.linear", "Linear"),
    ("bitsandbytes.nn.modules", "Linear4bit"),
    ("bitsandbytes.nn.modules", "Linear8bitLt"),
}
# Children of one module that are likely to be given the very same tensor; whether they are is seen at each call.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_TILE = 2**22  # entries of a weight that are merged at once: 16 MiB in float32
_CHUNK = 2**25  # bytes; the allocator of pinned memory rounds each request up to a power of two


@contextmanager
def fast_adapters(model: nn.Module, mode: str = "auto") -> Iterator[None]:
    """Inside the block the model's LoRA layers compute the same with less work; afterwards they are as before.

    To be entered under torch.no_grad() with the model in eval mode, inside of autocast if there is one. The active
    adapter's weights are read on entry: neither train nor switch adapters inside the block. A CUDA graph captured inside
    reads buffers that are freed at its end, so the graph must not outlive the block. Calls with gradients enabled take
    peft's own way.

    Touched are LoRA layers on linear layers (bitsandbytes' 4-bit and 8-bit ones too) that are plain: one active
    adapter, not merged, not disabled, no variant such as DoRA, no bias of its own, no dropout in force. Others, lm_head,
    embeddings and modules that appear in several places stay as they are.

    Args:
        model: with or without a PeftModel around it.
        mode: `fused`; `merged` (needs the size of the merged weights in host memory, pinned on CUDA, and rounds W + s B A
            to the dtype of W; layers whose base is quantized, or whose weight something else reads too, are fused);
            `off`; `auto`, which is `fused`.

    Raises:
        UserError: no such mode.
    """
    if mode not in MODES:
        raise UserError(f"The mode for adapters while sampling is {mode!r}; it must be one of {', '.join(MODES)}.")
    with ExitStack() as undo:
        if mode != "off":
            with torch.no_grad(), counted_as("adapter"):
                groups = _groups(model)
                if mode == "merged":
                    groups = _merge_all(model, groups, undo)
                _fuse_all(model, groups, undo)
        yield


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _plain_adapter(layer: nn.Module) -> str | None:
    """The name of the one adapter that acts in this LoRA layer, None where that is not all that happens there."""
    if _kind(layer) not in _LORA_LAYERS or _kind(layer.base_layer) not in _BASE_LAYERS:
        return None
    if layer.disable_adapters or layer.merged or "forward" in vars(layer):  # accelerate's hooks replace forward
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return None
    name = names[0]
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    plain = (
        type(a) is nn.Linear
        and type(b) is nn.Linear
        and a.bias is None
        and b.bias is None
        and name not in getattr(layer, "lora_variant", {})
        and not getattr(layer, "use_dora", {}).get(name)
        and (isinstance(dropout, nn.Identity) or not dropout.training)
    )
    return name if plain else None


def _groups(model: nn.Module) -> list[list[nn.Module]]:
    """Plain LoRA layers, those that may share an input together."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    head = unwrap(model).get_output_embeddings() if hasattr(unwrap(model), "get_output_embeddings") else None
    good = {
        id(m)
        for m in model.modules()
        if places[id(m)] == 1 and hasattr(m, "lora_A") and m is not head and _plain_adapter(m) is not None
    }
    groups: list[list[nn.Module]] = []
    for parent in model.modules():
        children = {name: child for name, child in parent.named_children() if id(child) in good}
        for names in _SIBLINGS:
            alike: dict[tuple, list[nn.Module]] = {}
            for name in names:
                if name in children:
                    child = children.pop(name)
                    a = child.lora_A[_plain_adapter(child)].weight
                    alike.setdefault((a.shape[1], a.device, a.dtype), []).append(child)
            groups.extend(alike.values())
        groups.extend([child] for child in children.values())
    return groups


def _replace_forward(layer: nn.Module, forward: Callable[..., Tensor], undo: ExitStack) -> None:
    undo.callback(vars(layer).pop, "forward", None)
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
        self.columns = [slice(first, last) for first, last in zip(ends, ends[1:])]


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


def _compute_dtype(model: nn.Module, layer: nn.Module) -> torch.dtype:
    """In which the layer's base computes, as far as that is known before its input is; any would be right."""
    weight = layer.base_layer.weight
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if _kind(layer.base_layer) == ("torch.nn.modules.linear", "Linear"):
        return weight.dtype
    floats = (p.dtype for name, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in name)
    return next(floats, torch.float32)


def _fuse_all(model: nn.Module, groups: list[list[nn.Module]], undo: ExitStack) -> None:
    last = _LastProduct()
    undo.callback(last._forget)
    for layers in groups:
        dtype = _compute_dtype(model, layers[0])
        names = [_plain_adapter(layer) for layer in layers]
        group = _Group([layer.lora_A[name].weight for layer, name in zip(layers, names)], dtype)
        for i, (layer, name) in enumerate(zip(layers, names)):
            # Laid out by rows: for a few rows of input that is the faster of the two on a CPU.
            bt = (layer.lora_B[name].weight * layer.scaling[name]).T.to(dtype).contiguous()
            _replace_forward(layer, _fused_forward(layer, last, group, i, bt), undo)


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


def _merge_all(model: nn.Module, groups: list[list[nn.Module]], undo: ExitStack) -> list[list[nn.Module]]:
    """Merge what can be; the other layers, in groups."""
    tensors = (t for m in model.modules() for t in [*m._parameters.values(), *m._buffers.values()] if t is not None)
    readers = Counter(t.untyped_storage()._cdata for t in tensors)

    def can(layer: nn.Module) -> bool:
        weight = layer.base_layer.weight
        alone = readers[weight.untyped_storage()._cdata] == 1
        plain = _kind(layer.base_layer) == ("torch.nn.modules.linear", "Linear") and not layer.fan_in_fan_out
        return plain and alone and weight.is_floating_point() and weight.is_contiguous()

    chosen = [layer for layers in groups for layer in layers if can(layer)]
    host = _HostBytes(sum(layer.base_layer.weight.nbytes for layer in chosen))
    for layer in chosen:
        name, weight = _plain_adapter(layer), layer.base_layer.weight
        undo.callback(_restore, host.keep(weight))
        _merge(weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        _replace_forward(layer, _merged_forward(layer.base_layer), undo)
    merged = set(chosen)
    return [rest for layers in groups if (rest := [layer for layer in layers if layer not in merged])]


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
