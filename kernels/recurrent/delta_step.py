"""The gated delta rule for one token a row, in one launch: what a decode step takes of it.

transformers' function takes some thirty launches for a token and writes the state four times; here it is read once and
written once, in its place. That is what a step's time is: 2 x 4 bytes x Dk x Dv a head and row.

For inference: nothing here has a gradient. Formulas are in `delta_chunks.py`; everything is computed in float32.
"""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.card import power_of_2
from lowvram_grpo.kernels.recurrent.delta_chunks import Inputs, delta_rule_tokens
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, device_guard, jit, require_triton, tl
from torch import Tensor

WIDEST = 256  # key
ENTRIES = 4096  # of a state, a program: 32 registers a thread
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_EPS = tl.constexpr(1e-6) if HAS_TRITON else 1e-6


def uses_triton(*tensors: Tensor) -> bool:
    """Whether the kernel runs on q, k, v, g, beta and state: all on CUDA, in dtypes and of widths that it knows."""
    plain = HAS_TRITON and all(x.is_cuda and x.dtype in _PLAIN for x in tensors)
    return plain and 0 < tensors[1].shape[-1] <= WIDEST


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, normalize: bool = True
) -> Tensor:
    """What the queries find (R, Hv, Dv), in the dtype of q; `state` is that after the token from here on.

    Args:
        q, k: (R, Hk, Dk), any strides.
        v: (R, Hv, Dv), where Hv is a multiple of Hk.
        g, beta: (R, Hv).
        state: (R, Hv, Dk, Dv) float32, the entries of a head's rows and columns without gaps.
        normalize: as in `delta_rule.gated_delta_rule`.

    Raises:
        ValueError: a state of another dtype or with gaps.
    """
    if state.dtype != torch.float32 or not _heads_are_dense(state):
        raise ValueError("a state is updated in its place where it is float32 and each head's entries lie side by side")
    if q.is_meta:
        return q.new_empty(v.shape)
    if uses_triton(q, k, v, g, beta, state):
        return gated_delta_step_triton(q, k, v, g, beta, state, normalize=normalize)
    return gated_delta_step_ref(q, k, v, g, beta, state, normalize=normalize)


def _heads_are_dense(state: Tensor) -> bool:
    """And no two rows share memory, as those of an expanded state would."""
    rows, heads, width, v_width = state.shape
    apart = (rows == 1 or state.stride(0) >= heads * width * v_width) and (
        heads == 1 or state.stride(1) == width * v_width
    )
    return apart and (width == 1 or state.stride(2) == v_width) and (v_width == 1 or state.stride(3) == 1)


def gated_delta_step_ref(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, normalize: bool = True
) -> Tensor:
    """As `gated_delta_step`, by PyTorch."""
    given = Inputs(*(x[:, None] for x in (q, k, v, g, beta)))
    out, after = delta_rule_tokens(given, state, normalize)
    state.copy_(after)
    return out[:, 0]


def gated_delta_step_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, normalize: bool = True
) -> Tensor:
    """As `gated_delta_step`, by the kernel."""
    require_triton("gated_delta_step_triton", state, "gated_delta_step_ref")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(v.shape, dtype=q.dtype, device=v.device)
    rows, heads, v_width = v.shape
    width = k.shape[2]
    block, columns = _tile(width, v_width)
    places = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    strides = {f"{n}_{at}": x.stride(d) for n, x in places.items() for d, at in enumerate(("row", "head"))}
    if out.numel():
        with device_guard(state):
            _step_kernel[(-(-v_width // columns), rows * heads)](
                q, k, v, g, beta, state, out, heads, heads // k.shape[1], width, v_width, width**-0.5,
                state.stride(0), **strides, BLOCK=block, COLUMNS=columns, NORMALIZE=normalize, num_warps=4,
            )  # fmt: skip
    return out


def _tile(width: int, v_width: int) -> tuple[int, int]:
    """Rows and columns of a program's part of a state."""
    block = max(16, power_of_2(width))
    return block, min(ENTRIES // block, max(16, power_of_2(v_width)))


@jit
def _step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, out_ptr, heads, group, width, v_width, scale, state_row,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, beta_row, beta_head,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    d = tl.arange(0, BLOCK)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = (d < width)[:, None] & (column < v_width)[None, :]
    place = state_ptr + row * state_row + h * width * v_width + d[:, None] * v_width + column[None, :]
    state = tl.load(place, mask=within, other=0.0)
    q = tl.load(q_ptr + row * q_row + h // group * q_head + d, mask=d < width, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row * k_row + h // group * k_head + d, mask=d < width, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row * v_row + h * v_head + column, mask=column < v_width, other=0.0).to(tl.float32)
    if NORMALIZE:
        q = q * tl.rsqrt(tl.sum(q * q, 0) + _EPS)
        k = k * tl.rsqrt(tl.sum(k * k, 0) + _EPS)
    state = state * tl.exp(tl.load(g_ptr + row * g_row + h * g_head).to(tl.float32))
    beta = tl.load(beta_ptr + row * beta_row + h * beta_head).to(tl.float32)
    correction = beta * (v - tl.sum(state * k[:, None], 0))
    state += k[:, None] * correction[None, :]
    tl.store(place, state, mask=within)
    out = tl.sum(state * (q * scale)[:, None], 0)
    at = (row * heads + h) * v_width + column
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=column < v_width)


def compile_cases(cc: int) -> list[CompileCase]:
    """Small and large heads, in the dtypes of models on compute capability `cc`."""
    cases = []
    for x in ("fp16", "fp32") if cc < 80 else ("bf16", "fp16", "fp32"):
        for width, v_width in ((16, 16), (64, 64), (128, 128), (256, 256)):
            block, columns = _tile(width, v_width)
            types = {f"{name}_ptr": f"*{x}:16" for name in ("q", "k", "v", "beta", "out")}
            types |= {"g_ptr": "*fp32:16", "state_ptr": "*fp32:16", "scale": "fp32"}
            types |= dict.fromkeys(("heads", "group", "width", "v_width", "state_row"), "i32")
            types |= {f"{name}_{at}": "i32" for name in ("q", "k", "v", "g", "beta") for at in ("row", "head")}
            constants = {"BLOCK": block, "COLUMNS": columns, "NORMALIZE": True}
            cases.append(compile_case(f"delta step {x} {width}", _step_kernel, types, constants))
    return cases
