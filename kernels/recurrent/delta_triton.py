"""A segment of the gated delta rule by the kernels: two launches forward, four back."""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.card import card, power_of_2
from lowvram_grpo.kernels.recurrent.delta_back_kernels import CHUNK_WARPS, back_chunk_kernel, back_scan_kernel
from lowvram_grpo.kernels.recurrent.delta_chunks import Inputs
from lowvram_grpo.kernels.recurrent.delta_kernels import (
    CHUNK,
    COLUMNS,
    LEAST_CARD,
    NARROWEST,
    SCAN_WARPS,
    STRIDES,
    SYSTEM_WARPS,
    WIDEST,
    precision_of,
    scan_kernel,
    systems_kernel,
)
from lowvram_grpo.kernels.runtime import HAS_TRITON, device_guard, require_triton
from torch import Tensor

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take q, k, v, g and beta: all on CUDA, in dtypes and with heads that they know."""
    if not HAS_TRITON or not all(x.is_cuda and x.dtype in _PLAIN for x in tensors):
        return False
    return 0 < tensors[1].shape[-1] <= WIDEST and card(tensors[1].device)[0] >= LEAST_CARD


class _Segment:
    """What all launches for a segment of tokens are given.

    Args:
        given: last dimensions of q, k and v are dense, or are made so by a copy.
    """

    def __init__(self, given: Inputs, normalize: bool):
        given = Inputs(*(x if x.stride(-1) == 1 else x.contiguous() for x in given[:3]), *given[3:])
        self.given, self.normalize = given, normalize
        self.batch, self.length, self.heads, self.v_width = given.v.shape
        self.width = given.k.shape[3]
        self.rows, self.chunks = self.batch * self.heads, -(-self.length // CHUNK)
        self.block = power_of_2(max(NARROWEST, self.width))
        self.columns = -(-self.v_width // COLUMNS)

    def buffer(self, *shape: int) -> Tensor:
        """(B Hv, chunks, ...), float32."""
        return torch.empty(self.rows, self.chunks, *shape, dtype=torch.float32, device=self.given.v.device)

    def sizes(self) -> dict[str, object]:
        """Of every launch."""
        plain = all(x.dtype == torch.float32 for x in self.given[:3])
        return {
            "length": self.length, "chunks": self.chunks, "heads": self.heads,
            "group": self.heads // self.given.k.shape[2], "width": self.width, "scale": self.width**-0.5,
            "BLOCK": self.block, "NORMALIZE": self.normalize,
            "PRECISION": precision_of("fp32" if plain else "fp16"),
        }  # fmt: skip

    def columns_of(self, warps: int) -> dict[str, int]:
        """Of a launch that goes over columns of values."""
        return {"v_width": self.v_width, "COLUMNS": COLUMNS, "num_warps": warps}

    def systems(self) -> tuple[Tensor, Tensor]:
        """(I + A)^-1 and P of all chunks."""
        q, k, _, g, beta = self.given
        inverse, attention = self.buffer(CHUNK, CHUNK), self.buffer(CHUNK, CHUNK)
        systems_kernel[(self.chunks, self.rows)](
            q,
            k,
            g,
            beta,
            inverse,
            attention,
            **self.sizes(),
            **_strides(q=q, k=k, g=g, beta=beta),
            num_warps=SYSTEM_WARPS,
        )
        return inverse, attention

    def scan(self, state: Tensor, inverse: Tensor, attention: Tensor, **outs: Tensor | None) -> None:
        """Over the chunks: see `scan_kernel`."""
        q, k, v, g, beta = self.given
        read = outs["out"] is not None
        scan_kernel[(self.columns, self.rows)](
            q if read else None, k, v, g, beta, inverse, attention if read else None, state, outs["end"], outs["out"],
            outs["states"], outs["solved"], **self.sizes(),
            **_strides(q=q, k=k, v=v, g=g, beta=beta, out=outs["out"] if read else v), READ=read, KEEP=not read,
            **self.columns_of(SCAN_WARPS),
        )  # fmt: skip


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"{name}_{at}": x.stride(d) for name, x in tensors.items() for d, at in enumerate(STRIDES)}


def segment_forward(given: Inputs, state: Tensor, out: Tensor, normalize: bool) -> Tensor:
    """As `delta_chunks.segment_forward`; `state` (B, Hv, Dk, Dv) is float32 and contiguous."""
    require_triton("segment_forward", given.v, "path='torch'")
    segment, end = _Segment(given, normalize), torch.empty_like(state)
    with device_guard(given.v):
        segment.scan(state, *segment.systems(), end=end, out=out, states=None, solved=None)
    return end


def segment_backward(
    given: Inputs, state: Tensor, d_out: Tensor | None, d_state: Tensor, grads: Inputs, normalize: bool
) -> Tensor:
    """As `delta_chunks.segment_backward`; states are float32 and contiguous, and `d_state` is written over."""
    require_triton("segment_backward", given.v, "path='torch'")
    s = _Segment(given, normalize)
    q, k, v, g, beta = s.given
    d_out = v.new_zeros(v.shape) if d_out is None else d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    with device_guard(v):
        inverse, attention = s.systems()
        states, d_states = s.buffer(s.width, s.v_width), s.buffer(s.width, s.v_width)
        solved, d_right = s.buffer(CHUNK, s.v_width), s.buffer(CHUNK, s.v_width)
        s.scan(state, inverse, attention, end=None, out=None, states=states, solved=solved)
        back_scan_kernel[(s.columns, s.rows)](
            q, k, g, beta, inverse, attention, d_out, d_state, d_states, d_right, **s.sizes(),
            **_strides(q=q, k=k, g=g, beta=beta, dout=d_out), **s.columns_of(SCAN_WARPS),
        )  # fmt: skip
        d_q, d_k = v.new_empty(2, s.batch, s.length, s.heads, s.width, dtype=torch.float32)
        back_chunk_kernel[(s.chunks, s.rows)](
            q, k, v, g, beta, attention, states, d_states, solved, d_right, d_out,
            d_q, d_k, grads.v, grads.g, grads.beta, **s.sizes(),
            **_strides(q=q, k=k, v=v, g=g, beta=beta, dout=d_out, dv=grads.v, dg=grads.g, dbeta=grads.beta),
            **s.columns_of(CHUNK_WARPS),
        )  # fmt: skip
        for d, grad in ((d_q, grads.q), (d_k, grads.k)):
            grad.copy_(d.unflatten(2, (grad.shape[2], -1)).sum(3))
    return d_state


def allocate(given: Inputs, normalize: bool, back: bool) -> None:
    """On the meta device: what a segment's launches take at once."""
    s = _Segment(given, normalize)
    kept = [s.buffer(CHUNK, CHUNK), s.buffer(CHUNK, CHUNK)]
    if back:
        kept += [s.buffer(s.width, s.v_width), s.buffer(s.width, s.v_width)]
        kept += [s.buffer(CHUNK, s.v_width), s.buffer(CHUNK, s.v_width)]
        both = given.v.new_empty(2, s.batch, s.length, s.heads, s.width, dtype=torch.float32)
        kept.append(both[0].unflatten(2, (given.k.shape[2], -1)).sum(3))
