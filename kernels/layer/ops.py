"""What stands between a decoder layer's products, one launch each: RMSNorm, the gated activation, rotary positions.

With a token a row a decode step is bound by launches, also inside a CUDA graph, and eager code takes some seven for an
RMSNorm, two for act(gate) * up and ten for the rotary positions of q and k. For inference: nothing here has a gradient.

    rms_norm   x / sqrt(mean(x^2) + eps) * (offset + weight)     (arXiv:1910.07467)
    swiglu     act(gate) * up                                    (arXiv:2002.05202)
    rope       x cos + (-x2, x1) sin, where x = (x1, x2)         (arXiv:2104.09864, halves as in GPT-NeoX)

Everything is computed in float32 and rounded where transformers' code rounds, so 16-bit results are the same but where
the order of a sum or the last bit of an exp tips a rounding. Memory: the outputs. On CUDA these are Triton kernels, on
the meta device the outputs alone, elsewhere the `*_ref` functions, whose operators are those of transformers.
"""

from __future__ import annotations

from itertools import product

import torch
from lowvram_grpo.kernels.card import power_of_2
from lowvram_grpo.kernels.layer.rope_kernel import launch_rope
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, device_guard, jit, require_triton, tl
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
# The widest row that a program keeps in its registers; wider ones are left to PyTorch.
MAX_WIDTH = 16_384
COLUMNS = 1024  # of the activation, a program
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def uses_triton(*tensors: Tensor) -> bool:
    """Whether the kernels run on these: all on CUDA, in dtypes that they know."""
    return HAS_TRITON and all(x.is_cuda and x.dtype in _PLAIN for x in tensors)


def rows_of(x: Tensor) -> Tensor:
    """(N, H) of (..., H), the entries of a row side by side; a copy only where x cannot be seen so."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


# RMSNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, early: bool = True) -> Tensor:
    """The RMSNorm of x (..., H) with weight (H,): the shape of x, of x's dtype or, `early`, of both's common one.

    Args:
        offset: 1 where the weight is stored as a difference from 1 (Gemma).
        early: round to x's dtype before the weight is applied (Llama) and not after it (Gemma, Olmo 2).
    """
    if x.is_meta:
        return x.new_empty(x.shape, dtype=_normed_dtype(x, weight, early))
    if uses_triton(x, weight) and 0 < x.shape[-1] <= MAX_WIDTH:
        return rms_norm_triton(x, weight, eps, offset=offset, early=early)
    return rms_norm_ref(x, weight, eps, offset=offset, early=early)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, early: bool = True) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if early:
        return (offset + weight if offset else weight) * h.to(x.dtype)
    return (h * (offset + weight.float() if offset else weight.float())).to(x.dtype)


def _normed_dtype(x: Tensor, weight: Tensor, early: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if early else x.dtype


def norm_tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: one row, or as many narrow ones (heads) as fill a warp's registers."""
    block = power_of_2(width)
    rows = max(1, 512 // block)
    return rows, block, min(16, max(1, rows * block // 512))


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, early: bool = True) -> Tensor:
    """As `rms_norm`, by the kernel, which takes rows of up to MAX_WIDTH."""
    require_triton("rms_norm_triton", x, "rms_norm")
    out = torch.empty(x.shape, dtype=_normed_dtype(x, weight, early), device=x.device)
    flat = rows_of(x)
    n, width = flat.shape
    rows, block, warps = norm_tile(width)
    if n:
        with device_guard(x):
            _rms_norm_kernel[(-(-n // rows),)](
                flat, weight.contiguous(), out, n, width, flat.stride(0), eps, OFFSET=float(offset), EARLY=early,
                ROWS=rows, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return out


@jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, n, width, x_stride, eps,
    OFFSET: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < n) & (column < width)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    if EARLY:
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    tl.store(out_ptr + row * width + column, (x * weight).to(out_ptr.dtype.element_ty), mask=mask)


# The gated activation of an MLP


def swiglu(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up of two (..., I) of one dtype; `act` is one of ACTIVATIONS."""
    if gate.is_meta:
        return torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device="meta")
    if uses_triton(gate, up) and gate.dtype == up.dtype and gate.shape == up.shape:
        return swiglu_triton(gate, up, act)
    return swiglu_ref(gate, up, act)


def swiglu_ref(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    return ACTIVATIONS[act](gate) * up


def swiglu_triton(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """As `swiglu`, by the kernel."""
    require_triton("swiglu_triton", gate, "swiglu")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    flat, others = rows_of(gate), rows_of(up)
    n, width = flat.shape
    if out.numel():
        with device_guard(gate):
            _swiglu_kernel[(n, -(-width // COLUMNS))](
                flat, others, out, width, flat.stride(0), others.stride(0), GELU=act == "gelu_tanh", BLOCK=COLUMNS,
                num_warps=4,
            )  # fmt: skip
    return out


@jit
def _swiglu_kernel(
    gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, GELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = gate
    if GELU:
        # (1 + tanh(y)) / 2 is the logistic function of 2 y, which loses nothing where tanh is near -1.
        u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    act = (gate / (1.0 + tl.exp(-u))).to(gate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + column, (act * up).to(out_ptr.dtype.element_ty), mask=mask)


# Rotary positions


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, heads, T, D) and k (B, KV heads, T, D) turned by cos and sin (B or 1, T, d), d <= D even.

    Entries behind the d-th stay as they are. Results are of the common dtype of q and cos, laid out as q and k.
    """
    if q.is_meta:
        return _rotated_like(q, cos), _rotated_like(k, cos)
    if uses_triton(q, k, cos, sin) and rotates(q, k, cos, sin):
        return rope_triton(q, k, cos, sin)
    return rope_ref(q, k, cos, sin)


def rope_ref(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate_ref(q, cos[:, None], sin[:, None]), _rotate_ref(k, cos[:, None], sin[:, None])


def _rotate_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    d = cos.shape[-1]
    turned, rest = x[..., :d], x[..., d:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _rotated_like(x: Tensor, cos: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, cos.dtype))


def rotates(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    alike = q.dtype == k.dtype and cos.dtype == sin.dtype and cos.shape == sin.shape and q.shape[-1] == k.shape[-1]
    dense = all(x.stride(-1) == 1 for x in (q, k, cos, sin))
    return alike and dense and cos.shape[-1] <= q.shape[-1] and cos.shape[-1] % 2 == 0


def rope_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rope`, by the kernel, which takes tensors whose last dimension is dense."""
    require_triton("rope_triton", q, "rope")
    outs = _rotated_like(q, cos), _rotated_like(k, cos)
    launch_rope(q, k, cos, sin, *outs, back=False)
    return outs


def compile_cases(cc: int) -> list[CompileCase]:
    """Both kernels at the narrowest and the widest tiles, in the dtypes that meet, for compute capability `cc`."""
    half = "fp16" if cc < 80 else "bf16"
    halves = list(dict.fromkeys((half, "fp16")))  # a model may be trained in float16 where bfloat16 exists
    dtypes = [(half, half), ("fp32", "fp32"), (half, "fp32"), ("fp32", half), *((x, x) for x in halves[1:])]
    widths = ((x, width) for x, width in product(dtypes, (64, 896, MAX_WIDTH)) if width != 896 or x == (half, half))
    cases = []
    for ((x, weight), width), (offset, early) in product(widths, ((0.0, True), (1.0, False))):
        rows, block, warps = norm_tile(width)
        out = "fp32" if early and weight == "fp32" else x
        types = {"x_ptr": f"*{x}:16", "weight_ptr": f"*{weight}:16", "out_ptr": f"*{out}:16", "eps": "fp32"}
        types |= dict.fromkeys(("n", "width", "x_stride"), "i32")
        constants = {"OFFSET": offset, "EARLY": early, "ROWS": rows, "BLOCK": block}
        name = f"rms_norm {width} {x} {weight} early={early}"
        cases.append(compile_case(name, _rms_norm_kernel, types, constants, warps))
    for x, gelu in product((*halves, "fp32"), (False, True)):
        types = {name: f"*{x}:16" for name in ("gate_ptr", "up_ptr", "out_ptr")}
        types |= dict.fromkeys(("width", "gate_stride", "up_stride"), "i32")
        cases.append(compile_case(f"swiglu {x} gelu={gelu}", _swiglu_kernel, types, {"GELU": gelu, "BLOCK": COLUMNS}))
    return cases
