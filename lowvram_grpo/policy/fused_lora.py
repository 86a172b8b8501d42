"""Plain LoRA layers in few launches, with a gradient: what training, scoring and evaluation run.

peft takes eight launches beside the base's product of each layer (casts of A, B and x, two products, a scaling, a copy,
a sum), and some twenty back. Here siblings (q, k and v; gate and up) are one autograd function (`lora_product.py`) on
copies of their factors that are made for a pass (`lora_factors.py`). The first sibling that is asked computes for all
of them, and the others find their outputs waiting.

A layer goes peft's own way where its adapter is not all that acts: another adapter beside it, a variant such as DoRA,
dropout in force, hooks on a factor or on the base, a base that is trained or of a kind that is not known (LLM.int8).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_grpo.policy.frozen_base import is_touched, knows, product
from lowvram_grpo.policy.lora_factors import FactorCache, LoraGroup
from lowvram_grpo.policy.lora_product import LoraCall, LoraProducts, lora_products
from lowvram_grpo.policy.own_forward import give_forward, stands_in
from lowvram_grpo.policy.plain_lora import PlainLora, plain_groups
from lowvram_grpo.policy.wrapper import unwrap

_PLACE = "_fused_lora_place"  # of a layer: its group, and which of the siblings it is


def fuse_lora(model: nn.Module, *, nf4_kernel: bool) -> int:
    """Have the plain LoRA layers of `model` compute in this way from now on; how many they are.

    Which adapter acts, whether it is switched off, and what it weighs is seen at each call: adapters may be trained,
    loaded, mixed, switched and merged as ever.

    Args:
        nf4_kernel: `kernels/layer/nf4_dense.py` runs on the model's device.
    """
    groups = [known for loras in plain_groups(model) if (known := [x for x in loras if knows(x.layer.base_layer)])]
    decoder = _decoder(model)
    cache = _PassCache()
    for loras in groups:
        group = _Siblings([lora.layer for lora in loras], cache, nf4_kernel)
        cache.groups.append(group)
        for i, layer in enumerate(group.layers):
            vars(layer)[_PLACE] = group, i
            give_forward(layer, _forward)
    if groups:
        for key, hook in list(decoder._forward_pre_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _PassCache):  # of an earlier call
                del decoder._forward_pre_hooks[key]
        decoder.register_forward_pre_hook(cache.pass_begins)
    return sum(map(len, groups))


def _decoder(model: nn.Module) -> nn.Module:
    inner = unwrap(model)
    return getattr(inner, getattr(inner, "base_model_prefix", ""), inner)


def forget_copies(model: nn.Module) -> None:
    """Let go of the 16-bit copies, for a phase that has no use for them; the next pass makes them again."""
    for hook in _decoder(model)._forward_pre_hooks.values():
        if isinstance(cache := getattr(hook, "__self__", None), _PassCache):
            cache.forget()


@stands_in
def _forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    group, i = vars(self)[_PLACE]
    output = None if args or kwargs else group.output(i, x)
    return type(self).forward(self, x, *args, **kwargs) if output is None else output


class _PassCache(FactorCache):
    """What the layers of one model have in common: the copies of the adapter that acts, and the outputs that siblings
    wait for, of one group at a time."""

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: no copies, no outputs."""
        return {"groups": self.groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.groups = state["groups"]
        self.forget()

    def forget(self) -> None:
        super().forget()
        self.drop_outputs()

    def pass_begins(self, *_: Any) -> None:
        super().pass_begins()
        self.drop_outputs()

    def drop_outputs(self, gone: weakref.ref | None = None) -> None:
        if gone is None or gone is self._x:  # the end of an older x is not that of a newer one's outputs
            self._group = self._x = None
            self._outputs: dict[int, Tensor] = {}

    def keep_outputs(self, group: LoraGroup, x: Tensor, outputs: dict[int, Tensor]) -> None:
        self._group, self._x, self._outputs = group, weakref.ref(x, self.drop_outputs), outputs

    def take(self, group: LoraGroup, i: int, x: Tensor) -> Tensor | None:
        if self._group is not group or i not in self._outputs or self._x() is not x:
            return None
        output = self._outputs.pop(i)
        if not self._outputs:
            self.drop_outputs()
        return output

    def waits(self, group: LoraGroup, i: int) -> bool:
        """Whether an output of `i` waits, to another input than it has come with."""
        return self._group is group and i in self._outputs


class _Siblings(LoraGroup):
    """A group whose layers compute for each other as long as they are given the same tensor."""

    def __init__(self, layers: list[nn.Module], cache: _PassCache, kernel: bool):
        super().__init__(layers)
        self.cache, self.kernel = cache, kernel
        self._together = len(layers) > 1

    def output(self, i: int, x: Tensor) -> Tensor | None:
        """The i-th layer's output; None where peft must give it."""
        layer, cache = self.layers[i], self.cache
        if (output := cache.take(self, i, x)) is not None:
            return output
        graph = torch.is_grad_enabled()
        if layer.disable_adapters:
            if layer.merged or (graph and x.requires_grad) or is_touched(layer.base_layer):
                return None
            return product(layer.base_layer, x, self.kernel)
        if cache.waits(self, i) and not graph:
            # These siblings read different tensors. While a graph is made it stays undecided: what a checkpointed
            # layer saves must be the same the second time.
            self._together = False
        loras = self.acting()
        if loras is None or not x.numel():
            return None
        alone = not self._together or cache.waits(self, i)
        members = [i] if alone else list(range(len(self.layers)))
        call = LoraCall(self, members, loras, _dtype(x, loras[0]), cache, self.kernel)
        weights = [weight for m in members for weight in (loras[m].a, loras[m].b)]
        if graph and (x.requires_grad or any(weight.requires_grad for weight in weights)):
            outputs = dict(zip(members, LoraProducts.apply(call, x, *weights)))
        else:
            outputs = dict(zip(members, lora_products(call, x)[0]))
        output = outputs.pop(i)
        if outputs:
            cache.keep_outputs(self, x, outputs)
        return output


def _dtype(x: Tensor, lora: PlainLora) -> torch.dtype:
    """What peft computes the adapter in."""
    kind = x.device.type
    if kind == "meta":  # where autocast does not count, and weights are in its dtype
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lora.a.dtype
