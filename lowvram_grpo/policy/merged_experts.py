"""Experts that a checkpoint stores one by one, where the model has all of a layer in one 3-D parameter.

transformers merges them as it loads, by rules of each family (`WeightConverter`), with a layer's experts in 16 bits in
memory. Here its rules say what goes where, and what is merged is read one matrix at a time, as it is placed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowvram_grpo.policy.stored_weights import STATE, MXFP4Experts, Stacked, StoredNF4
from lowvram_grpo.policy.text_model import text_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowvram_grpo.policy.checkpoint import CheckpointSource, StoredTensor

_INDEX = re.compile(r"\.(\d+)(?=\.)")


@dataclass(frozen=True)
class MergedExperts(Stacked):
    """Stored as matrices: of each expert one, or several one above the other."""

    matrices: tuple[tuple[StoredTensor, ...], ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrices[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.matrices[0]
        return (len(self.matrices), sum(m.shape[0] for m in first), *first[0].shape[1:])

    def expert(self, index: int) -> Any:
        parts = [matrix() for matrix in self.matrices[index]]
        if not all(isinstance(part, Tensor) for part in parts):
            return parts
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def merge(model: PreTrainedModel, source: CheckpointSource) -> CheckpointSource:
    """`source`, with experts that transformers would merge under their parameter's name.

    What is stored incompletely, or takes other operations than stacking, stays as it is.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter) and _stacks(rule)]
    if not converters:
        return source
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    patterns = {p: (rule, i) for rule in converters for i, p in enumerate(rule.source_patterns)}
    found: dict[str, dict[int, dict[int, str]]] = {}
    for name in source.tensors:
        for key in dict.fromkeys((name, text_name(name) or name)):
            place, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
            index = _INDEX.findall(key)
            if pattern in patterns and place in shapes and index:
                found.setdefault(place, {}).setdefault(int(index[-1]), {})[patterns[pattern][1]] = name
                break
    merged: dict[str, Any] = {}
    gone: set[str] = set()
    for place, experts in found.items():
        names = [[experts.get(e, {})[i] for i in sorted(experts.get(e, {}))] for e in range(shapes[place][0])]
        made = MergedExperts(tuple(tuple(source.tensors[n] for n in each) for each in names))
        if sorted(experts) == list(range(shapes[place][0])) and _even(made) and made.shape == shapes[place]:
            merged[place] = made
            gone.update(name for each in names for name in each)
    return type(source)({**{n: t for n, t in source.tensors.items() if n not in gone}, **merged})


def unpacked(source: CheckpointSource, kind: str) -> CheckpointSource:
    """`source`, which is stored in `kind` (nf4 or mxfp4), with each of its weights under its own name."""
    tensors: dict[str, Any] = dict(source.tensors)
    for name in source.tensors:
        if kind == "nf4" and name.endswith(STATE):
            weight = name.removesuffix(STATE)
            beside = {n[len(weight) + 1 :]: t for n, t in source.tensors.items() if n.startswith(f"{weight}.")}
            for part in beside:
                del tensors[f"{weight}.{part}"]
            tensors[weight] = StoredNF4(source.tensors[weight], beside)
        elif kind == "mxfp4" and name.endswith("_blocks"):
            weight = name.removesuffix("_blocks")
            blocks, scales = tensors.pop(name), tensors.pop(f"{weight}_scales")
            tensors[weight] = MXFP4Experts(blocks, scales)
    return type(source)(tensors)


def _stacks(rule: Any) -> bool:
    """Whether a rule stacks matrices to (E, rows, columns), several of an expert one above the other, and no more."""
    kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in rule.operations]
    return kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _even(made: MergedExperts) -> bool:
    return len({tuple(m.shape for m in each) for each in made.matrices}) == 1
