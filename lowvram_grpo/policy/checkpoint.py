"""Checkpoints in safetensors files, read one tensor at a time.

Each tensor is mapped into memory on its own and unmapped when it is dropped, so a process never appears to hold a whole
shard, and Windows need not commit one.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.stream import expected_names
from lowvram_grpo.policy.text_model import text_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Saved by old versions of transformers, and computed from the configuration since.
COMPUTED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its bytes are [begin, begin + size) of the file."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __call__(self) -> Tensor:
        """The tensor, on the CPU, as a private view of the file."""
        if self.size == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        # Copy on write, for torch has no read-only tensors.
        data = np.memmap(self.path, dtype=np.uint8, mode="c", offset=self.begin, shape=(self.size,))
        if self.begin % self.dtype.itemsize:
            data = np.array(data)
        return torch.from_numpy(data).view(self.dtype).view(self.shape)


class CheckpointSource:
    """(name, function that reads the tensor) for the tensors of a checkpoint, in the order of its files.

    Attributes:
        tensors: what is stored, by name.
    """

    def __init__(self, tensors: dict[str, StoredTensor]):
        self.tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        yield from self.tensors.items()

    def renamed(self, names: dict[str, str]) -> CheckpointSource:
        """The tensors that are keys of `names`, under its values."""
        return CheckpointSource({names[name]: t for name, t in self.tensors.items() if name in names})


def checkpoint_source(model: str, **hub: Any) -> CheckpointSource:
    """The safetensors of a folder or hub id, one file or several by their index.

    Args:
        model: a folder, or a hub id that is downloaded if it is not cached.
        hub: revision, token, cache_dir.

    Raises:
        FileNotFoundError: there are no safetensors.
        UserError: a file is cut off.
        ValueError: a file is no safetensors file, or holds dtypes that are not known here.
        OSError: no such model.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _files(model, **hub):
        found = _read_header(path)
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"{path} repeats the tensor {min(twice)}")
        tensors |= found
    return CheckpointSource(tensors)


def _files(model: str, **hub: Any) -> list[str]:
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    optional = {"_raise_exceptions_for_missing_entries": False, **hub}
    if single := cached_file(model, "model.safetensors", **optional):
        return [single]
    if index := cached_file(model, "model.safetensors.index.json", **optional):
        return get_checkpoint_shard_files(model, index, **hub)[0]
    raise FileNotFoundError(f"{model} holds no safetensors")


def _read_header(path: str) -> dict[str, StoredTensor]:
    """A file starts with its header's length (8 bytes, little-endian) and the header (json); offsets count from there.

    https://github.com/huggingface/safetensors#format
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.path.getsize(path):
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path} holds {entry['dtype']}")
        begin = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
    if any(t.begin + t.size > os.path.getsize(path) for t in tensors.values()):
        raise UserError(f"{path!r} is cut off; download it again.")
    return dict(sorted(tensors.items(), key=lambda item: item[1].begin))


def can_stream(model: PreTrainedModel, source: CheckpointSource, quantization: str) -> dict[str, str] | None:
    """How the checkpoint's names map to the model's, or None where only from_pretrained knows how to load it.

    Args:
        model: from `skeleton`.
        source: from `checkpoint_source`.
        quantization: none or nf4; None is returned for anything else.
    """
    from transformers.pytorch_utils import Conv1D

    if quantization not in ("none", "nf4") or getattr(model.config, "quantization_config", None) is not None:
        return None
    # GPT-2's layers hold their weights transposed.
    if any(isinstance(module, Conv1D) for module in model.modules()):
        return None
    if converts(model, source):
        return None
    return _match(model, source)


def converts(model: PreTrainedModel, source: CheckpointSource) -> bool:
    """Whether transformers would make another tensor of one of the checkpoint's, or of several."""
    return any(rule.rename_source_key(name)[1] for rule in _rules(model, renaming=False) for name in source.tensors)


def _rules(model: PreTrainedModel, *, renaming: bool) -> list[Any]:
    """transformers' rules for this kind of model: those that only rename, or the others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming) == renaming]


def places(model: PreTrainedModel, source: CheckpointSource) -> dict[str, str]:
    """What the model calls each tensor of the checkpoint, by the tensor's name; the name itself where it calls none so.

    Left out are other parts of a multimodal model, and what the model's class says that it has no use for.
    """
    known, prefix = set(model.state_dict()), f"{getattr(model, 'base_model_prefix', '')}."
    rules = _rules(model, renaming=True)
    unused = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    inside = any((text := text_name(name)) in known and text != name for name in source.tensors)
    found = {}
    for name in source.tensors:
        renamed = name
        for rule in rules:
            renamed = rule.rename_source_key(renamed)[0]
        text = text_name(name)
        candidates = (renamed, prefix + renamed, name, prefix + name, text)
        place = next((place for place in candidates if place in known), None)
        if place is None and ((inside and text is None) or any(pattern.search(name) for pattern in unused)):
            continue
        found[name] = place or name
    return found


def _match(model: PreTrainedModel, source: CheckpointSource) -> dict[str, str] | None:
    expected, tied = set(expected_names(model)), getattr(model, "all_tied_weights_keys", {})
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names: dict[str, str] = {}
    copies: list[tuple[str, str]] = []
    for name, place in places(model, source).items():
        if name.endswith(COMPUTED) and name not in shapes:
            continue
        if shapes.get(place) != source.tensors[name].shape:
            return None
        if place in tied:
            copies.append((name, tied[place]))
        else:
            names[name] = place
    for name, place in copies:
        twin = next((n for n, p in names.items() if p == place), None)
        if twin is None:
            names[name] = place
        elif not torch.equal(source.tensors[twin](), source.tensors[name]()):
            # The config says tied, the checkpoint knows better.
            return None
    placed = list(names.values())
    return names if len(placed) == len(set(placed)) and set(placed) == expected else None
