"""The language-model head, as a stream of vocabulary tiles.

A `Head` knows everything between the last hidden state and the logits: `softcap * tanh(scale * (W h + b) / softcap)`.
Its weight may be dense or quantized, on the device that computes or in host memory: whoever needs it asks for a tile
or for some rows, in the dtype and on the device of the computation.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from lowvram_grpo.kernels.cuts import cuts
from lowvram_grpo.kernels.quantized import Int8Weight, NF4Weight
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_CENTRES = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Head:
    """Output projection of a causal language model.

    Attributes:
        weight: (V, H), any float dtype, or a quantized weight of that shape.
        bias: (V,) or None.
        logit_scale: factor on the logits before soft-capping (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: c in `c * tanh(logit / c)` (Gemma 2), or None.
    """

    weight: Tensor | Int8Weight | NF4Weight
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H)."""
        return tuple(self.weight.shape)

    @property
    def dense(self) -> bool:
        return isinstance(self.weight, Tensor)

    @property
    def trainable(self) -> bool:
        return (self.dense and self.weight.requires_grad) or (self.bias is not None and self.bias.requires_grad)

    def is_view(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a tile costs nothing: it is a view of the weight."""
        return self.dense and self.weight.dtype == dtype and self.weight.device == device

    def tile(self, v0: int, v1: int, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows v0 to v1 of the weight (v1 - v0, H) and bias, in the dtype and on the device of `buffer`.

        The weight is a view where it can be; else it is written to the first rows of `buffer` (>= v1 - v0, H).
        """
        bias = None if self.bias is None else self.bias.detach()[v0:v1].to(buffer.device)
        if self.is_view(buffer.dtype, buffer.device):
            return self.weight.detach()[v0:v1], bias
        out = buffer[: v1 - v0]
        if self.dense:
            rows = _near(self.weight.detach()[v0:v1], out.device, out.dtype)
            return out.copy_(rows, non_blocking=True), bias
        return self.weight.tile(v0, v1, out), bias

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, H) weight rows `ids` (n,), of `dtype` and on the device of `ids`."""
        if self.dense:
            rows = self.weight.detach()[ids.to(self.weight.device)]
            return _near(rows, ids.device, dtype).to(ids.device, dtype, non_blocking=True)
        return self.weight.rows(ids, torch.empty(len(ids), self.shape[1], dtype=dtype, device=ids.device))

    def centre(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(mean, radius): the mean weight row (H,) float32, and the furthest that any row is from it, a float32
        scalar; with soft-capping the zero row and the longest row's norm, for the slopes of the tail are unknown.

        Kept for as long as the weight lives unchanged.
        """
        key = self.weight if self.dense else self.weight.flatten()[0][0]
        known = _CENTRES.get(key)
        if known is None or known[0] != (key._version, self.softcap is None, device):
            _CENTRES[key] = known = ((key._version, self.softcap is None, device), *self._centre(device))
        return known[1], known[2]

    @torch.no_grad()
    def _centre(self, device: torch.device) -> tuple[Tensor, Tensor]:
        v, h = self.shape
        step = max(1, 2**20 // h)
        buffer = torch.empty(min(step, v), h, device=device)
        mean, radius = torch.zeros(h, device=device), torch.zeros((), device=device)
        tiles = cuts(v, step, device)
        if self.softcap is None:
            for v0, v1 in tiles:
                mean += self.tile(v0, v1, buffer)[0].sum(0)
            mean /= v
        for v0, v1 in tiles:
            w = self.tile(v0, v1, buffer)[0]
            radius = torch.maximum(radius, (w - mean).norm(dim=1).amax())
        return mean, radius

    def flatten(self) -> tuple[list[Tensor], list[float]]:
        """Tensors and numbers from which `unflatten` builds this head again: what an operator's schema can carry."""
        kind = (Tensor, Int8Weight, NF4Weight).index(type(self.weight) if not self.dense else Tensor)
        tensors, numbers = ([self.weight], []) if self.dense else self.weight.flatten()
        bias = [] if self.bias is None else [self.bias]
        return bias + tensors, [kind, len(bias), self.logit_scale, self.softcap or 0.0, *numbers]

    @classmethod
    def unflatten(cls, tensors: list[Tensor], numbers: list[float]) -> Head:
        kind, has_bias, scale, softcap, *rest = numbers
        bias, parts = (tensors[0], tensors[1:]) if has_bias else (None, tensors)
        if kind == 0:
            weight = parts[0]
        elif kind == 1:
            weight = Int8Weight(*parts)
        else:
            weight = NF4Weight(*parts[:3], tuple(parts[3:]) or None, rest[0], int(rest[1]))
        return cls(weight, bias, scale, softcap or None)

    def quantized(self, kind: str) -> Head:
        """This head with its weight in `int8` or `nf4`.

        Raises:
            ValueError: unknown kind, or a hidden size that NF4 cannot block.
        """
        kinds = {"int8": Int8Weight, "nf4": NF4Weight}
        if kind not in kinds:
            raise ValueError(f"a head can be quantized to {' or '.join(kinds)}, not {kind!r}")
        return replace(self, weight=kinds[kind].quantize(self.weight.detach()))


def _near(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rows that lie in host memory as something that a tensor of `dtype` on a card takes over without anybody waiting:
    in page-locked memory, and not to be cast on the way, which the host would do, but where it arrives."""
    if rows.device == device or not (device.type == "cuda" and rows.device.type == "cpu"):
        return rows
    if not rows.is_pinned():
        with suppress(RuntimeError):  # the system grants none: the copy waits, then
            rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
    return rows if rows.dtype == dtype else rows.to(device, non_blocking=True)
