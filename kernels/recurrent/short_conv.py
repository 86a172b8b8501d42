"""A short causal convolution of each channel with itself (Mamba's and LFM2's), one launch each way.

    y_t = act(b + sum_j w_j x_{t - K + 1 + j})        act is silu, or nothing

Eager code pads, convolves, cuts and activates, and keeps the input and the sums for the way back; here the input is
kept and sums are computed again. Results lie in memory as the inputs do, so that what splits their channels behind it
sees rows of tokens without a copy. Everything is computed in float32; the sum is rounded to the dtype of the weights
before the activation, and its result to that of the input, as transformers rounds. The filter is frozen: where it is
trained, autograd's own way is taken.

The step for one token a row keeps a state of the last inputs, which it moves on in its place, in one launch for seven.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, device_guard, jit, require_triton, tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ACTIVATIONS = (None, "silu", "swish")
LONGEST = 8  # filter: its taps are unrolled
_TOKENS, _CHANNELS, _WARPS = 8, 64, 8  # of a program: two sums a thread, whose taps take registers
_STEP_CHANNELS = 256
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def uses_triton(*tensors: Tensor | None) -> bool:
    """Whether the kernels run on inputs and filters: all on CUDA, in dtypes that they know."""
    return HAS_TRITON and all(x is None or (x.is_cuda and x.dtype in _PLAIN) for x in tensors)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None) -> Tensor:
    """y (B, C, L) in the dtype of x, with a gradient to x.

    Args:
        x: (B, C, L), any strides; zeros come before it.
        weight: (C, K) with K <= 8; gets no gradient, nor does `bias` (C,).
        act: one of ACTIVATIONS.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _CausalConv.apply(x, weight.detach(), None if bias is None else bias.detach(), act)
    return _conv(x, weight, bias, act)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.act = act
        return _conv(x, weight, bias, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight, bias = ctx.saved_tensors
        if x.is_meta:
            return torch.empty_like(x), None, None, None
        back = causal_conv_back_triton if uses_triton(dy, x, weight, bias) else causal_conv_back_ref
        return back(dy, x, weight, bias, ctx.act), None, None, None


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    if x.is_meta:
        return torch.empty_like(x)
    if uses_triton(x, weight, bias):
        return causal_conv_triton(x, weight, bias, act)
    return causal_conv_ref(x, weight, bias, act)


def causal_conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    y = F.conv1d(x.to(weight.dtype), weight[:, None], bias, padding=weight.shape[1] - 1, groups=weight.shape[0])
    y = y[..., : x.shape[-1]]
    return (y if act is None else F.silu(y)).to(x.dtype)


def causal_conv_back_ref(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(causal_conv_ref(x, weight, bias, act), x, dy)
    return dx


def causal_conv_triton(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    """As `causal_conv`, by the kernel, without a gradient."""
    require_triton("causal_conv_triton", x, "causal_conv_ref")
    return _launch(x, x, weight, bias, act, back=False)


def causal_conv_back_triton(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    """The gradient to x, by the kernel."""
    require_triton("causal_conv_back_triton", x, "causal_conv_back_ref")
    return _launch(dy, x, weight, bias, act, back=True)


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _launch(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, back: bool) -> Tensor:
    out = torch.empty_like(x)
    batch, channels, length = x.shape
    places = {"dy": dy, "x": x, "out": out}
    strides = {f"{n}_{at}": t.stride(d) for n, t in places.items() for d, at in enumerate(("row", "channel", "token"))}
    grid = -(-length // _TOKENS), -(-channels // _CHANNELS), batch
    if out.numel():
        with device_guard(x):
            _conv_kernel[grid](
                dy, x, weight.contiguous(), _dense(bias), out, channels, length, **strides, TAPS=weight.shape[1],
                SILU=act is not None, BACK=back, TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=_WARPS,
            )  # fmt: skip
    return out


@jit
def _sums(x_ptr, weight_ptr, bias_ptr, token, channel, length, known, x_channel, x_token, TAPS: tl.constexpr):
    """Of some tokens and channels, rounded as the filter is."""
    total = (token[:, None] + channel[None, :]).to(tl.float32) * 0.0
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(TAPS):
        at = token - (TAPS - 1) + j
        mask = ((at >= 0) & (at < length))[:, None] & known[None, :]
        x = tl.load(x_ptr + at[:, None] * x_token + channel[None, :] * x_channel, mask=mask, other=0.0)
        w = tl.load(weight_ptr + channel * TAPS + j, mask=known, other=0.0).to(tl.float32)
        total += w[None, :] * x.to(weight_ptr.dtype.element_ty).to(tl.float32)
    return total.to(weight_ptr.dtype.element_ty).to(tl.float32)


@jit
def _conv_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, out_ptr, channels, length, dy_row, dy_channel, dy_token, x_row, x_channel,
    x_token, out_row, out_channel, out_token,
    TAPS: tl.constexpr, SILU: tl.constexpr, BACK: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    x_ptr += row * x_row
    dy_ptr += row * dy_row
    if BACK:
        found = (token[:, None] + channel[None, :]).to(tl.float32) * 0.0
        for j in tl.static_range(TAPS):
            # x_t is in y_{t + j} by the tap that stands j before the last one.
            later = token + j
            mask = (later < length)[:, None] & known[None, :]
            d = tl.load(dy_ptr + later[:, None] * dy_token + channel[None, :] * dy_channel, mask=mask, other=0.0)
            d = d.to(tl.float32)
            if SILU:
                total = _sums(x_ptr, weight_ptr, bias_ptr, later, channel, length, known, x_channel, x_token, TAPS)
                s = 1.0 / (1.0 + tl.exp(-total))
                d = d * s * (1.0 + total * (1.0 - s))
            w = tl.load(weight_ptr + channel * TAPS + (TAPS - 1 - j), mask=known, other=0.0).to(tl.float32)
            found += w[None, :] * d
    else:
        found = _sums(x_ptr, weight_ptr, bias_ptr, token, channel, length, known, x_channel, x_token, TAPS)
        if SILU:
            found = (found / (1.0 + tl.exp(-found))).to(weight_ptr.dtype.element_ty)
    out_ptr += row * out_row
    place = out_ptr + token[:, None] * out_token + channel[None, :] * out_channel
    tl.store(place, found.to(out_ptr.dtype.element_ty), mask=(token < length)[:, None] & known[None, :])


# One token a row


def causal_conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None) -> Tensor:
    """y (R, C) in the dtype of x; `state` has lost its first column and ends with x from here on.

    Args:
        x: (R, C), any strides.
        state: (R, C, S) with S >= K - 1, any strides without overlap; what came before x, the last one last.
        weight, bias, act: as in `causal_conv`.
    """
    if x.is_meta:
        return x.new_empty(x.shape)
    if uses_triton(x, state, weight, bias):
        return causal_conv_step_triton(x, state, weight, bias, act)
    return causal_conv_step_ref(x, state, weight, bias, act)


def causal_conv_step_ref(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None
) -> Tensor:
    seen = torch.cat([state, x[..., None]], -1)
    state.copy_(seen[..., 1:])
    y = (seen[..., -weight.shape[1] :].to(weight.dtype).float() * weight.float()).sum(-1)
    y = (y if bias is None else y + bias.float()).to(weight.dtype)
    return (y if act is None else F.silu(y)).to(x.dtype)


def causal_conv_step_triton(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, act: str | None = None
) -> Tensor:
    """As `causal_conv_step`, by the kernel."""
    require_triton("causal_conv_step_triton", x, "causal_conv_step_ref")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, channels = x.shape
    if out.numel():
        with device_guard(x):
            _step_kernel[(-(-channels // _STEP_CHANNELS), rows)](
                x, state, weight.contiguous(), _dense(bias), out, channels, *x.stride(), *state.stride(),
                TAPS=weight.shape[1], KEPT=state.shape[2], SILU=act is not None, CHANNELS=_STEP_CHANNELS, num_warps=4,
            )  # fmt: skip
    return out


@jit
def _step_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, out_ptr, channels, x_row, x_channel, state_row, state_channel, state_token,
    TAPS: tl.constexpr, KEPT: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    known = channel < channels
    x = tl.load(x_ptr + row * x_row + channel * x_channel, mask=known, other=0.0)
    total = x.to(tl.float32) * 0.0
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    state_ptr += row * state_row + channel * state_channel
    # Columns move one place down, each written after it was read; those that the filter reaches count.
    for j in tl.static_range(KEPT):
        seen = tl.load(state_ptr + j * state_token, mask=known, other=0.0)
        if j > 0:
            tl.store(state_ptr + (j - 1) * state_token, seen, mask=known)
        if j > KEPT - TAPS:
            w = tl.load(weight_ptr + channel * TAPS + (TAPS - 1 - KEPT + j), mask=known, other=0.0).to(tl.float32)
            total += w * seen.to(weight_ptr.dtype.element_ty).to(tl.float32)
    tl.store(state_ptr + (KEPT - 1) * state_token, x.to(state_ptr.dtype.element_ty), mask=known)
    w = tl.load(weight_ptr + channel * TAPS + (TAPS - 1), mask=known, other=0.0).to(tl.float32)
    total += w * x.to(weight_ptr.dtype.element_ty).to(tl.float32)
    total = total.to(weight_ptr.dtype.element_ty).to(tl.float32)
    if SILU:
        total = (total / (1.0 + tl.exp(-total))).to(weight_ptr.dtype.element_ty)
    tl.store(out_ptr + row * channels + channel, total.to(out_ptr.dtype.element_ty), mask=known)


def compile_cases(cc: int) -> list[CompileCase]:
    """Filters of 3 and 4 taps with their usual activations, both ways, and the step; channels or tokens dense."""
    cases = []
    ways = product(("fp16", "fp32") if cc < 80 else ("bf16", "fp16", "fp32"), ((3, False), (4, True)), (False, True))
    for x, (taps, silu), back in ways:
        types = {f"{name}_ptr": f"*{x}:16" for name in ("dy", "x", "weight", "out")}
        types |= {"bias_ptr": f"*{x}:16" if silu else None, "channels": "i32", "length": "i32"}
        types |= {f"{name}_{at}": "i32" for name in ("dy", "x", "out") for at in ("row", "channel", "token")}
        constants = {"TAPS": taps, "SILU": silu, "BACK": back, "TOKENS": _TOKENS, "CHANNELS": _CHANNELS}
        for dense in ("channel", "token"):  # Triton compiles anew for a stride of 1
            some = constants | {f"{name}_{dense}": 1 for name in ("dy", "x", "out")}
            name = f"short conv {'back ' if back else ''}{x} {taps} taps, {dense}s dense"
            cases.append(compile_case(name, _conv_kernel, types, some, _WARPS))
        if not back:
            types = {f"{name}_ptr": f"*{x}:16" for name in ("x", "state", "weight", "out")}
            types |= {"bias_ptr": f"*{x}:16" if silu else None, "channels": "i32"}
            types |= dict.fromkeys(("x_row", "x_channel", "state_row", "state_channel", "state_token"), "i32")
            constants = {"TAPS": taps, "KEPT": taps, "SILU": silu, "CHANNELS": _STEP_CHANNELS}
            cases.append(compile_case(f"short conv step {x} {taps} taps", _step_kernel, types, constants))
    return cases
