"""RMSNorm, gated activation and rotary positions with a gradient: the kernels of `ops.py`, and one launch back.

Autograd takes some fifteen launches back through an RMSNorm, six through act(gate) * up and eighteen through the rotary
positions of q and k, and keeps float32 copies of what went through a norm. Here the inputs are kept and nothing else:

    rms_norm   dx = r (g - x r mean(g x r)),  g = dy (offset + weight),  r = 1 / sqrt(mean(x^2) + eps)
    swiglu     dgate = dy up act'(gate),  dup = dy act(gate)
    rope       dx = dy cos + (dy2 sin2, -dy1 sin1), where dy = (dy1, dy2)

The weight of a norm is frozen: where it is trained, autograd's own way is taken. Everything is computed in float32 and
rounded to the dtypes of the inputs. On CUDA these are Triton kernels, on the meta device the outputs alone, elsewhere
the `*_back_ref` functions.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from lowvram_grpo.kernels.layer import ops
from lowvram_grpo.kernels.layer.rope_kernel import launch_rope
from lowvram_grpo.kernels.runtime import CompileCase, compile_case, device_guard, jit, require_triton, tl
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, early: bool = True) -> Tensor:
    """As `ops.rms_norm`, with a gradient to x; `weight` gets none."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, weight.detach(), eps, offset, early)
    return ops.rms_norm(x, weight, eps, offset=offset, early=early)


def swiglu(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """As `ops.swiglu`, with a gradient to both."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up, act)
    return ops.swiglu(gate, up, act)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.rope`, with a gradient to q and k; the tables get none."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rope.apply(q, k, cos.detach(), sin.detach())
    return ops.rope(q, k, cos, sin)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, early: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return ops.rms_norm(x, weight, eps, offset=offset, early=early)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        return rms_norm_back(dy, x, weight, ctx.eps, ctx.offset), None, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return ops.swiglu(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        return *swiglu_back(dy, *ctx.saved_tensors, ctx.act), None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.like = [(x.shape, x.stride(), x.dtype) for x in (q, k)]
        return ops.rope(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple:
        # Laid out as q and k were, so that what comes next sees them as rows of tokens without a copy.
        outs = [torch.empty_strided(s, t, dtype=d, device=dq.device) if _dense(s, t) else None for s, t, d in ctx.like]
        outs = [torch.empty(s, dtype=d, device=dq.device) if o is None else o for o, (s, _, d) in zip(outs, ctx.like)]
        return *rope_back(dq, dk, *ctx.saved_tensors, *outs), None, None


def _dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether these strides leave no gaps and do not overlap."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


# RMSNorm


def rms_norm_back(dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """dx, of the shape and dtype of x (..., H)."""
    if x.is_meta:
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    if ops.uses_triton(dy, x, weight) and 0 < x.shape[-1] <= ops.MAX_WIDTH:
        return rms_norm_back_triton(dy, x, weight, eps, offset)
    return rms_norm_back_ref(dy, x, weight, eps, offset)


def rms_norm_back_ref(dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    h = x.float()
    r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    h, g = h * r, dy.float() * (weight.float() + offset)
    return (r * (g - h * (g * h).mean(-1, keepdim=True))).to(x.dtype)


def rms_norm_back_triton(dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """As `rms_norm_back`, by the kernel."""
    require_triton("rms_norm_back_triton", x, "rms_norm_back_ref")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, given = ops.rows_of(x), ops.rows_of(dy)
    n, width = flat.shape
    rows, block, warps = ops.norm_tile(width)
    if n:
        with device_guard(x):
            _rms_norm_back_kernel[(-(-n // rows),)](
                given, flat, weight.contiguous(), out, n, width, given.stride(0), flat.stride(0), eps,
                OFFSET=float(offset), ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return out


@jit
def _rms_norm_back_kernel(
    dy_ptr, x_ptr, weight_ptr, out_ptr, n, width, dy_stride, x_stride, eps,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < n) & (column < width)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    g = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32) * weight
    x = x * r
    dx = r * (g - x * (tl.sum(g * x, 1) / width)[:, None])
    tl.store(out_ptr + row * width + column, dx.to(out_ptr.dtype.element_ty), mask=mask)


# The gated activation of an MLP


def swiglu_back(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup), of the shapes and dtypes of gate and up (..., I)."""
    if gate.is_meta:
        return tuple(torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (gate, up))
    if ops.uses_triton(dy, gate, up) and gate.shape == up.shape == dy.shape:
        return swiglu_back_triton(dy, gate, up, act)
    return swiglu_back_ref(dy, gate, up, act)


def swiglu_back_ref(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        g = gate.detach().float().requires_grad_()
        acted = ops.ACTIVATIONS[act](g)
    (dgate,) = torch.autograd.grad(acted, g, dy.float() * up.float())
    return dgate.to(gate.dtype), (dy.float() * acted.detach().to(gate.dtype).float()).to(up.dtype)


def swiglu_back_triton(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """As `swiglu_back`, by the kernel."""
    require_triton("swiglu_back_triton", gate, "swiglu_back_ref")
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    flat = [ops.rows_of(x) for x in (dy, gate, up)]
    n, width = flat[0].shape
    if n * width:
        with device_guard(gate):
            _swiglu_back_kernel[(n, -(-width // ops.COLUMNS))](
                *flat, *outs, width, *(x.stride(0) for x in flat), GELU=act == "gelu_tanh", BLOCK=ops.COLUMNS,
                num_warps=4,
            )  # fmt: skip
    return outs


@jit
def _swiglu_back_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, width, dy_stride, gate_stride, up_stride,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    u, slope = gate, gate * 0.0 + 1.0
    if GELU:
        # As in ops.py: act(gate) = gate * logistic(u).
        u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    s = 1.0 / (1.0 + tl.exp(-u))
    act = (gate * s).to(gate_ptr.dtype.element_ty).to(tl.float32)
    dgate = dy * up * (s + gate * s * (1.0 - s) * slope)
    tl.store(dgate_ptr + row * width + column, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * width + column, (dy * act).to(dup_ptr.dtype.element_ty), mask=mask)


# Rotary positions


def rope_back(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to q and k, written into `q_out` and `k_out`; arguments as the results and arguments of `rope`."""
    if dq.is_meta:
        return q_out, k_out
    dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk))
    dense = q_out.stride(-1) == k_out.stride(-1) == 1 and ops.rotates(dq, dk, cos, sin)
    if dense and ops.uses_triton(dq, dk, cos, sin, q_out):
        return rope_back_triton(dq, dk, cos, sin, q_out, k_out)
    return tuple(out.copy_(x) for out, x in zip((q_out, k_out), rope_back_ref(dq, dk, cos, sin)))


def rope_back_ref(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    first, second = sin.chunk(2, -1)
    return ops.rope_ref(dq, dk, cos, torch.cat((-second, -first), -1))


def rope_back_triton(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor
) -> tuple[Tensor, Tensor]:
    """As `rope_back`, by the kernel, which takes tensors whose last dimension is dense."""
    require_triton("rope_back_triton", dq, "rope_back_ref")
    launch_rope(dq, dk, cos, sin, q_out, k_out, back=True)
    return q_out, k_out


def compile_cases(cc: int) -> list[CompileCase]:
    """Both kernels at the narrowest and the widest tiles, in the dtypes that meet, for compute capability `cc`."""
    half = "fp16" if cc < 80 else "bf16"
    halves = list(dict.fromkeys((half, "fp16")))  # as in ops.py
    dtypes = [(half, half), ("fp32", "fp32"), (half, "fp32"), ("fp32", half), *((x, x) for x in halves[1:])]
    sizes = (64, 896, ops.MAX_WIDTH)
    widths = ((x, width) for x, width in product(dtypes, sizes) if width != 896 or x == (half, half))
    cases = []
    for ((x, weight), width), offset in product(widths, (0.0, 1.0)):
        rows, block, warps = ops.norm_tile(width)
        types = {"dy_ptr": f"*{'fp32' if 'fp32' in (x, weight) else x}:16", "weight_ptr": f"*{weight}:16"}
        types |= {"x_ptr": f"*{x}:16", "out_ptr": f"*{x}:16", "eps": "fp32"}
        types |= dict.fromkeys(("n", "width", "dy_stride", "x_stride"), "i32")
        constants = {"OFFSET": offset, "ROWS": rows, "BLOCK": block}
        name = f"rms_norm back {width} {x} {weight} offset={offset}"
        cases.append(compile_case(name, _rms_norm_back_kernel, types, constants, warps))
    for x, gelu in product((*halves, "fp32"), (False, True)):
        types = {f"{name}_ptr": f"*{x}:16" for name in ("dy", "gate", "up", "dgate", "dup")}
        types |= dict.fromkeys(("width", "dy_stride", "gate_stride", "up_stride"), "i32")
        constants = {"GELU": gelu, "BLOCK": ops.COLUMNS}
        cases.append(compile_case(f"swiglu back {x} gelu={gelu}", _swiglu_back_kernel, types, constants))
    return cases
