"""LoRA layers that compute y = base(x) + s B A x and nothing else, in groups that are likely to read the same tensor.

Those that sampling (`rollout/adapters.py`) and training may compute in their own way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from lowvram_grpo.policy.own_forward import has_foreign_forward, is_watched
from lowvram_grpo.policy.wrapper import unwrap

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
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


@dataclass(frozen=True, eq=False)
class PlainLora:
    """A LoRA layer and the one adapter that acts in it: a (r, I), b (O, r)."""

    layer: nn.Module
    name: str
    a: Tensor
    b: Tensor
    scaling: float


def _plain(layer: nn.Module) -> PlainLora | None:
    """None where one adapter's s B A is not all that is added to the base layer."""
    if _kind(layer) not in _LORA_LAYERS or _kind(layer.base_layer) not in _BASE_LAYERS:
        return None
    return None if has_foreign_forward(layer) else acting(layer)


def acting(layer: nn.Module) -> PlainLora | None:
    """The adapter of a LoRA layer, if there is just one that acts now and it adds s B A and nothing else."""
    if layer.disable_adapters or layer.merged:
        return None
    # Asked in every layer's call, so by the dictionaries: nn.Module.__getattr__ takes its time.
    lora_a, lora_b, dropouts = (layer._modules[part]._modules for part in ("lora_A", "lora_B", "lora_dropout"))
    names = [name for name in layer.active_adapters if name in lora_a]
    if len(names) != 1:
        return None
    name = names[0]
    a, b, dropout = lora_a[name], lora_b[name], dropouts[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return None
    if a._parameters["bias"] is not None or b._parameters["bias"] is not None:
        return None
    if name in getattr(layer, "lora_variant", ()) or getattr(layer, "use_dora", {}).get(name):
        return None
    if is_watched(a) or is_watched(b) or is_watched(dropout):
        return None
    if dropout.training and getattr(dropout, "p", 1.0 if not isinstance(dropout, nn.Identity) else 0.0):
        return None
    return PlainLora(layer, name, a.weight, b.weight, layer.scaling[name])


def plain_groups(model: nn.Module) -> list[list[PlainLora]]:
    """Plain LoRA layers, those that may share an input together."""
    parents = [dict(module.named_children()) for module in model.modules()]
    places = Counter(id(child) for children in parents for child in children.values())
    inner = unwrap(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    groups: list[list[PlainLora]] = []
    for children in parents:
        found: dict[str, PlainLora] = {}
        for name, child in children.items():
            if hasattr(child, "lora_A") and child is not head and places[id(child)] == 1 and (lora := _plain(child)):
                found[name] = lora
        for names in _SIBLINGS:
            alike: dict[tuple, list[PlainLora]] = {}
            for name in names:
                if name in found:
                    lora = found.pop(name)
                    kind = lora.a.shape[1], lora.a.device, _kind(lora.layer.base_layer)
                    alike.setdefault(kind, []).append(lora)
            groups.extend(alike.values())
        groups.extend([lora] for lora in found.values())
    return groups


def has_plain_base(layer: nn.Module) -> bool:
    return type(layer.base_layer) is nn.Linear
