"""A segment of the gated delta rule by the kernels: two launches forward, seven back."""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.card import card
from lowvram_grpo.kernels.recurrent.delta_back_kernels import (
    CHUNK_WARPS,
    ROW_TOKENS,
    ROW_WARPS,
    back_chunk_kernel,
    back_pairs_kernel,
    back_rows_kernel,
    back_scan_kernel,
)
from lowvram_grpo.kernels.recurrent.delta_chunks import Inputs
from lowvram_grpo.kernels.recurrent.delta_kernels import (
    CHUNK,
    COLUMNS,
    LEAST_CARD,
    PRECISION,
    SCAN_WARPS,
    SLICE,
    STRIDES,
    SYSTEM_WARPS,
    WIDEST,
    scan_kernel,
    systems_kernel,
)
from lowvram_grpo.kernels.runtime import HAS_TRITON, device_guard, require_triton
from torch import Tensor


def fits(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> bool:
    """Whether the kernels are for these: on CUDA with tensor cores that Triton knows, q, k and v in one dtype of 16
    bits, keys of at most 128."""
    if not HAS_TRITON or not all(x.is_cuda for x in (q, k, v, g, beta)):
        return False
    plain = q.dtype == k.dtype == v.dtype and v.dtype in (torch.bfloat16, torch.float16)
    known = all(x.dtype in (torch.float32, v.dtype) for x in (g, beta))
    return plain and known and 0 < k.shape[-1] <= WIDEST and card(v.device)[0] >= LEAST_CARD


class _Segment:
    """What all launches for a segment of tokens are given.

    Args:
        given: last dimensions of q, k and v are dense, or are made so by a copy.
    """

    def __init__(self, given: Inputs, normalize: bool):
        given = Inputs(*(x if x.stride(-1) == 1 else x.contiguous() for x in given[:3]), *given[3:])
        self.given, self.normalize = given, normalize
        self.batch, self.length, self.heads, self.v_width = given.v.shape
        self.width, self.key_heads = given.k.shape[3], given.k.shape[2]
        self.rows, self.chunks = self.batch * self.heads, -(-self.length // CHUNK)
        # Programs of a launch, and what the launch takes by name.
        self.by_chunk, self.by_column = (self.chunks, self.rows), (-(-self.v_width // COLUMNS), self.rows)
        self.sizes = {
            "length": self.length, "chunks": self.chunks, "heads": self.heads,
            "group": self.heads // self.key_heads, "width": self.width, "scale": self.width**-0.5,
            "PRECISION": PRECISION, "num_stages": 1,
        }  # fmt: skip
        self.columns = {"v_width": self.v_width, "COLUMNS": COLUMNS}
        self.scanning = {**self.columns, "TWO": self.width > SLICE, "num_warps": SCAN_WARPS}

    def buffer(self, *shape: int) -> Tensor:
        """(B Hv, chunks, ...), float32."""
        return torch.empty(self.rows, self.chunks, *shape, dtype=torch.float32, device=self.given.v.device)

    def units_buffers(self) -> Tensor:
        """(2, B, tokens, Hv, Dk), float32."""
        shape = 2, self.batch, self.length, self.heads, self.width
        return torch.empty(shape, dtype=torch.float32, device=self.given.v.device)

    def systems_buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.buffer(CHUNK, CHUNK), self.buffer(CHUNK, CHUNK), self.buffer(2, CHUNK)

    def systems(self) -> tuple[Tensor, Tensor, Tensor]:
        """(I + A)^-1, P and norms of all chunks."""
        q, k, _, g, beta = self.given
        found = self.systems_buffers()
        systems_kernel[self.by_chunk](
            q, k, g, beta, *found, **self.sizes, **_strides(q=q, k=k, g=g, beta=beta), NORMALIZE=self.normalize,
            num_warps=SYSTEM_WARPS,
        )  # fmt: skip
        return found

    def read(self, state: Tensor, out: Tensor) -> Tensor:
        """Over the chunks: the last state; what queries find goes into `out`."""
        q, k, v, g, beta = self.given
        end = torch.empty_like(state)
        scan_kernel[self.by_column](
            q, k, v, g, beta, *self.systems(), state, end, out, None, None, **self.sizes,
            **_strides(q=q, k=k, v=v, g=g, beta=beta, out=out), READ=True, KEEP=False, **self.scanning,
        )  # fmt: skip
        return end

    def keep(self, state: Tensor, inverse: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Over the chunks again: the state before each, and U."""
        _, k, v, g, beta = self.given
        found = self.buffer(self.width, self.v_width), self.buffer(CHUNK, self.v_width)
        scan_kernel[self.by_column](
            None, k, v, g, beta, inverse, None, norms, state, None, None, *found, **self.sizes,
            **_strides(q=k, k=k, v=v, g=g, beta=beta, out=v), READ=False, KEEP=True, **self.scanning,
        )  # fmt: skip
        return found


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"{name}_{at}": x.stride(d) for name, x in tensors.items() for d, at in enumerate(STRIDES)}


def segment_forward(given: Inputs, state: Tensor, out: Tensor, normalize: bool) -> Tensor:
    """As `delta_chunks.segment_forward`; `state` (B, Hv, Dk, Dv) is float32 and contiguous."""
    require_triton("segment_forward", given.v, "path='torch'")
    with device_guard(given.v):
        return _Segment(given, normalize).read(state, out)


def segment_backward(
    given: Inputs, state: Tensor, d_out: Tensor | None, d_state: Tensor, grads: Inputs, normalize: bool
) -> Tensor:
    """As `delta_chunks.segment_backward`; states are float32 and contiguous, and `d_state` is written over."""
    require_triton("segment_backward", given.v, "path='torch'")
    s = _Segment(given, normalize)
    q, k, v, g, beta = s.given
    d_out = v.new_zeros(v.shape) if d_out is None else d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    with device_guard(v):
        inverse, attention, norms = s.systems()
        states, solved = s.keep(state, inverse, norms)
        d_states, d_right = s.buffer(s.width, s.v_width), s.buffer(CHUNK, s.v_width)
        back_scan_kernel[s.by_column](
            q, k, g, beta, inverse, attention, norms, d_out, d_state, d_states, d_right, **s.sizes,
            **_strides(q=q, k=k, g=g, beta=beta, dout=d_out), **s.scanning,
        )  # fmt: skip
        sums = s.buffer(2, CHUNK)
        back_pairs_kernel[s.by_chunk](
            k, v, g, beta, inverse, attention, norms, solved, d_right, d_out, grads.v, sums, **s.sizes,
            **_strides(k=k, v=v, g=g, beta=beta, dout=d_out, dv=grads.v), **s.columns, num_warps=CHUNK_WARPS,
        )  # fmt: skip
        d_units = s.units_buffers()
        back_chunk_kernel[s.by_chunk](
            q, k, g, beta, inverse, attention, norms, states, d_states, solved, d_right, d_out, sums,
            *d_units, grads.g, grads.beta, **s.sizes,
            **_strides(q=q, k=k, g=g, beta=beta, dout=d_out, dg=grads.g, dbeta=grads.beta), **s.columns,
            num_warps=CHUNK_WARPS,
        )  # fmt: skip
        for x, d_unit, grad in zip((q, k), d_units, grads):
            back_rows_kernel[(-(-s.length // ROW_TOKENS), s.key_heads, s.batch)](
                x, d_unit, grad, s.length, s.heads, s.heads // s.key_heads, s.width, **_strides(x=x, dx=grad),
                NORMALIZE=normalize, num_warps=ROW_WARPS, num_stages=1,
            )  # fmt: skip
    return d_state


def allocate(given: Inputs, normalize: bool, back: bool) -> None:
    """On the meta device: what a segment's launches take at once, beside what comes back."""
    s = _Segment(given, normalize)
    kept = list(s.systems_buffers())
    if back:
        kept += [s.buffer(n, s.v_width) for n in (s.width, s.width, CHUNK, CHUNK)]
        kept += [s.buffer(2, CHUNK), s.units_buffers()]
