"""LoRA layers that cost less while sampling: two small products a layer, or none.

With one token a row, a decode step is bound by how many operators it launches and how many weights it reads. peft's
layer takes up to six operators beside the base layer's product: casts, two products, a multiplication, an addition.
Here, for the length of a rollout:

* **fused**: `y = base(x)`, then `y += (x A^T) (s B)^T` in place by one product that adds. A and s B are cast once.
  Layers that read the same tensor (q, k and v; gate and up) share one product with their stacked A, and with
  `fused_ops` one kernel for all the rest.
* **merged**: `W += s B A` in an unquantized base weight, whose old bits wait in host memory and come back as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.host import HostBytes
from lowvram_grpo.memory.ledger import counted_as
from lowvram_grpo.policy.fused_lora import forget_copies
from lowvram_grpo.policy.overflow import is_wide
from lowvram_grpo.policy.own_forward import replace_forward
from lowvram_grpo.policy.plain_lora import PlainLora, has_plain_base, plain_groups
from lowvram_grpo.rollout.siblings import FusedLinears, OutputCache, StackedLoraA, fused_linears

MODES = ("auto", "fused", "merged", "off")

_TILE = 2**22  # entries of a weight that are merged at once: 16 MiB in float32


@contextmanager
def fast_adapters(model: nn.Module, mode: str = "auto", fused_ops: str = "off") -> Iterator[None]:
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
        fused_ops: kernels of `trials` (`auto`, `on`, `off`); with `nf4_product` or `dense_product` among them the base
            layers' products, biases and adapters are one launch for all layers that share an input, and one for x A^T,
            for up to 64 rows in 16 bits.

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
                _fuse_all(model, groups, fused_ops, undo)
        yield


# Fused


def _fuse_all(model: nn.Module, groups: list[list[PlainLora]], fused_ops: str, undo: ExitStack) -> None:
    # What a model with a quantized base computes in.
    floats = (p.dtype for name, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in name)
    model_dtype = next(floats, torch.float32)
    cache = OutputCache()
    undo.callback(cache.forget)
    for loras in groups:
        weight = loras[0].layer.base_layer.weight
        kind = weight.device.type
        if kind == "meta":  # where autocast does not count: it is what a GPU's would be
            dtype = weight.dtype if has_plain_base(loras[0].layer) else model_dtype
        elif is_wide(loras[0].layer):  # where autocast is off
            dtype = torch.float32
        else:  # what training computes the adapter in
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else loras[0].a.dtype
        lora_a = StackedLoraA([lora.a for lora in loras], dtype)
        # Laid out by rows: for a few rows of input that is the faster of the two on a CPU.
        lora_b = [(lora.b * lora.scaling).T.to(dtype).contiguous() for lora in loras]
        fused = fused_linears(loras, lora_a, lora_b, fused_ops)
        for i, (lora, b_t) in enumerate(zip(loras, lora_b)):
            replace_forward(lora.layer, "forward", _fused_forward(lora.layer, cache, lora_a, fused, i, b_t), undo)


def _fused_forward(
    layer: nn.Module, cache: OutputCache, lora_a: StackedLoraA, fused: FusedLinears | None, i: int, b_t: Tensor
) -> Callable[..., Tensor]:
    """`b_t`: (r, O), scaled."""
    base, slow = layer.base_layer, type(layer).forward

    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or torch.is_grad_enabled():
            return slow(layer, x, *args, **kwargs)
        if fused is not None and fused.accepts(x):
            return cache.get(fused, i, x)
        z = cache.get(lora_a, i, x)
        y = base(x)
        if y.dtype == z.dtype == b_t.dtype and y.is_contiguous():
            y.view(-1, b_t.shape[1]).addmm_(z, b_t)
            return y
        # Autocast on meta tensors, or a base that answers in another dtype than it computes in.
        return y.add_(torch.mm(z.to(b_t.dtype), b_t).view(y.shape))

    return forward


# Merged


def _merge_all(model: nn.Module, groups: list[list[PlainLora]], undo: ExitStack) -> list[list[PlainLora]]:
    """Merge what can be; the other layers, in groups."""
    tensors = (t for m in model.modules() for t in [*m._parameters.values(), *m._buffers.values()] if t is not None)
    readers = Counter(t.untyped_storage()._cdata for t in tensors)

    def can(layer: nn.Module) -> bool:
        weight = layer.base_layer.weight
        alone = readers[weight.untyped_storage()._cdata] == 1
        return has_plain_base(layer) and alone and weight.is_floating_point() and weight.is_contiguous()

    chosen = {lora for loras in groups for lora in loras if can(lora.layer)}
    merged = [lora for loras in groups for lora in loras if lora in chosen]
    host = HostBytes()
    kept = host.keep([lora.layer.base_layer.weight for lora in merged])
    for lora, place in zip(merged, kept):
        weight = lora.layer.base_layer.weight
        undo.callback(host.put_back, weight, place)
        _merge(weight, lora.a, lora.b, lora.scaling)
        replace_forward(lora.layer, "forward", _merged_forward(lora.layer.base_layer), undo)
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
