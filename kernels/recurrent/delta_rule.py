"""The gated delta rule over sequences, with a gradient, in the memory of its inputs and a few states.

transformers' function keeps some thirty float32 tensors of the size of queries or values for the backward pass. Here a
sequence of n chunks is cut into some sqrt(n) segments: the states between these are kept, and nothing else but the
inputs; the backward pass computes a segment again, holding the states between its chunks (Chen et al. 2016,
arXiv:1604.06174). On CUDA the kernels of `delta_triton.py` take a segment, elsewhere `delta_chunks.py`; on the meta
device the larger of both is allocated and one chunk computed, since all are alike.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from lowvram_grpo.kernels.recurrent import delta_chunks, delta_triton
from lowvram_grpo.kernels.recurrent.delta_chunks import Inputs, compute_dtype
from torch import Tensor
from torch.autograd.function import once_differentiable

PATHS = ("triton", "torch")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    *,
    normalize: bool = True,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, L, Hv, Dv) in the dtype of q, the state after the last token (B, Hv, Dk, Dv) in float32), see
    `delta_chunks.py`; with gradients to all inputs and the initial state.

    Args:
        q, k: (B, L, Hk, Dk), any strides; q is divided by sqrt(Dk).
        v: (B, L, Hv, Dv), where Hv is a multiple of Hk.
        g: (B, L, Hv), logarithms of decays, not positive.
        beta: (B, L, Hv).
        initial_state: (B, Hv, Dk, Dv), any float dtype; None for zeros.
        normalize: divide rows of q and k by sqrt(their squared norm + 1e-6) first.
        path: one of PATHS; by default what the device can. float64 is computed in float64, by "torch" only.

    Raises:
        ValueError: shapes that do not belong together, or a path that cannot be taken here.
    """
    _check(q, k, v, g, beta, initial_state)
    if path is not None and path not in PATHS:
        raise ValueError(f"unknown path {path!r}; it is one of {', '.join(PATHS)}")
    kernels = delta_triton.fits(q, k, v, g, beta) if path is None else path == "triton"
    given = Inputs(q, k, v, g, beta)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*given, initial_state)):
        return _DeltaRule.apply(*given, initial_state, normalize, kernels)
    return _forward(given, initial_state, normalize, kernels, keep=False)[:2]


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> None:
    rows, heads = tuple(v.shape[:2]), v.shape[2]
    together = q.shape == k.shape and tuple(k.shape[:2]) == rows and tuple(g.shape) == tuple(beta.shape)
    if not together or tuple(g.shape) != (*rows, heads) or heads % max(1, k.shape[2]) or not k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, g, beta))
        raise ValueError(
            f"q and k are (B, L, Hk, Dk), v is (B, L, Hv, Dv), g and beta are (B, L, Hv) with Hv a multiple of Hk, "
            f"not {shapes}"
        )
    expected = (rows[0], heads, k.shape[3], v.shape[3])
    if state is not None and tuple(state.shape) != expected:
        raise ValueError(f"the initial state is (B, Hv, Dk, Dv) = {expected}, not {tuple(state.shape)}")


def segment_tokens(length: int, chunk: int) -> int:
    """Tokens of a segment, whole chunks: as many chunks as there are segments, so that states between segments and
    states inside of one take the least together."""
    chunks = -(-length // chunk)
    return chunk * (isqrt(max(0, chunks - 1)) + 1)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *given, initial, normalize, kernels = args
        out, state, starts = _forward(Inputs(*given), initial, normalize, kernels, keep=True)
        ctx.normalize, ctx.kernels = normalize, kernels
        ctx.save_for_backward(*given, initial, *starts)
        ctx.set_materialize_grads(False)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_state: Tensor | None) -> tuple:
        q, k, v, g, beta, initial, *starts = ctx.saved_tensors  # once: activation checkpointing unpacks no second time
        given = Inputs(q, k, v, g, beta)
        grads = Inputs(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given))
        # A copy: the kernels write over it.
        d_state = _state(given, None) if d_state is None else d_state.contiguous().clone()
        back = delta_triton.segment_backward if ctx.kernels else delta_chunks.segment_backward
        with _no_autocast(given.v):
            for begin, end in reversed(_segments(given, ctx.kernels)):
                start = starts.pop() if begin else _state(given, initial)
                if _is_like_the_first(given, begin):
                    continue
                some = None if d_out is None else d_out[:, begin:end]
                parts = given.tokens(begin, end), grads.tokens(begin, end)
                d_state = back(parts[0], start, some, d_state, parts[1], ctx.normalize)
                if given.v.is_meta:
                    delta_triton.allocate(parts[0], ctx.normalize, back=True)
        return *grads, None if initial is None else d_state.to(initial.dtype), None, None


def _forward(
    given: Inputs, initial: Tensor | None, normalize: bool, kernels: bool, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What the queries found, the last state, and with `keep` those between segments."""
    out = torch.empty(given.v.shape, dtype=given.q.dtype, device=given.v.device)
    state, starts = _state(given, initial), []
    take = delta_triton.segment_forward if kernels else delta_chunks.segment_forward
    with _no_autocast(given.v):
        for begin, end in _segments(given, kernels):
            if begin and keep:
                starts.append(state)
            if _is_like_the_first(given, begin):
                state = torch.empty_like(state)
                continue
            state = take(given.tokens(begin, end), state, out[:, begin:end], normalize)
            if given.v.is_meta:
                delta_triton.allocate(given.tokens(begin, end), normalize, back=False)
    return out, state, starts


def _state(given: Inputs, initial: Tensor | None) -> Tensor:
    """A state of its own, in the dtype of sums: nobody else's may be returned as the last one."""
    shape = given.v.shape[0], given.v.shape[2], given.k.shape[3], given.v.shape[3]
    state = torch.empty(shape, dtype=compute_dtype(given.q), device=given.v.device)
    return state.zero_() if initial is None else state.copy_(initial)


def _segments(given: Inputs, kernels: bool) -> list[tuple[int, int]]:
    length = given.v.shape[1]
    step = segment_tokens(length, delta_triton.CHUNK if kernels else delta_chunks.CHUNK)
    return [(begin, min(length, begin + step)) for begin in range(0, length, step)]


def _is_like_the_first(given: Inputs, begin: int) -> bool:
    """Of meta tensors only the first segment is computed."""
    return given.v.is_meta and begin > 0


def _no_autocast(x: Tensor) -> torch.autocast:
    """A state is a sum over all tokens before: autocast would round it to 16 bits in each chunk."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)
