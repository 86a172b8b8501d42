"""Weights that a checkpoint of a mixture of experts holds in fewer bits already, read one matrix at a time.

* bitsandbytes' NF4, an expert after another, as of models stored in 4 bits before transformers 5 fused experts: a
  matrix's bytes go to where they belong as they are.
* MXFP4, in which gpt-oss is published (OCP Microscaling Formats v1.0): 32 weights along the inputs share a power of
  two, each is one of 16 numbers. transformers makes all of it bfloat16 where its kernels are missing; here an expert at
  a time is, and brought to NF4, which rounds once more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowvram_grpo.kernels.quantized import BLOCK, STATISTICS_BLOCK
from lowvram_grpo.policy.merged_experts import Stacked

if TYPE_CHECKING:
    from lowvram_grpo.policy.checkpoint import CheckpointSource, StoredTensor

_STATE = ".quant_state.bitsandbytes__nf4"
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127  # of the exponents


@dataclass(frozen=True)
class StoredNF4:
    """A matrix in bitsandbytes' NF4: its packed bytes, and by bitsandbytes' names what belongs to them."""

    packed: StoredTensor
    beside: dict[str, StoredTensor]

    @cached_property
    def _numbers(self) -> dict[str, Any]:
        return json.loads(bytes(self.beside[_STATE[1:]]().tolist()))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._numbers["shape"])

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self._numbers["dtype"])

    def __call__(self) -> StoredNF4:
        """Nothing is read yet."""
        return self

    def statistics(self) -> dict[str, Tensor]:
        """What `Params4bit.from_prequantized` takes beside the packed bytes."""
        return {name: tensor() for name, tensor in self.beside.items()}

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Packed, scales, their scales, their offset, as in a record; None where it is quantized in another way."""
        found = self._numbers
        if found["blocksize"] != BLOCK or found.get("nested_blocksize") != STATISTICS_BLOCK:
            return None
        offset = torch.tensor(float(found["nested_offset"]))
        return self.packed(), self.beside["absmax"](), self.beside["nested_absmax"](), offset

    def dense(self) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState.from_dict(self.statistics(), torch.device("cpu"))
        return dequantize_4bit(self.packed(), state)


class MXFP4Experts(Stacked):
    """A 3-D parameter (E, in, out) that is stored as blocks (E, out, in / 32, 16), two numbers a byte, the first in the
    low bits, and their exponents (E, out, in / 32)."""

    def __init__(self, blocks: StoredTensor, scales: StoredTensor):
        self.blocks, self.scales = blocks, scales
        count, rows, groups, size = blocks.shape
        self.shape, self.dtype = (count, groups * size * 2, rows), torch.bfloat16

    def expert(self, index: int) -> Tensor:
        table = torch.tensor(_FP4, dtype=self.dtype)
        blocks, exponents = self.blocks()[index], self.scales()[index].to(torch.int32) - _BIAS
        numbers = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1)
        return torch.ldexp(numbers.flatten(2), exponents[..., None]).flatten(1).t().contiguous()


def unpacked(source: CheckpointSource, kind: str) -> CheckpointSource:
    """`source`, which is stored in `kind` (nf4 or mxfp4), with each of its weights under its own name."""
    tensors: dict[str, Any] = dict(source.tensors)
    for name in source.tensors:
        if kind == "nf4" and name.endswith(_STATE):
            weight = name.removesuffix(_STATE)
            beside = {n[len(weight) + 1 :]: t for n, t in source.tensors.items() if n.startswith(f"{weight}.")}
            for part in beside:
                del tensors[f"{weight}.{part}"]
            tensors[weight] = StoredNF4(source.tensors[weight], beside)
        elif kind == "mxfp4" and name.endswith("_blocks"):
            weight = name.removesuffix("_blocks")
            blocks, scales = tensors.pop(name), tensors.pop(f"{weight}_scales")
            tensors[weight] = MXFP4Experts(blocks, scales)
    return type(source)(tensors)
