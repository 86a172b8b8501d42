"""The kernel of `grpo_loss.py`, whose formulas it has line by line, and its launch: one program a sequence.

float32 throughout. Each input is read once; sequence level reads six of them twice. exp after Cody & Waite 1980.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, jit, tl
from torch import Tensor

from lowvram_grpo.objective import CLIPPED, MAX_LOG_RATIO

# What the kernel is compiled for; 0 is a loss without KL.
ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3, "exact": 4}
# Of the policy term: its bounds or its gate, a detached and bounded ratio, no ratio at all.
FAMILIES = {**dict.fromkeys(CLIPPED, 0), "sapo": 1, "cispo": 2, "vespo": 3}
# Columns of the row sums. The first SUMMED are added up; the bounds, -min and max of the ratio, are folded by max.
LOSS, KL, LOW, HIGH, ENTROPY, TOKENS = range(6)
SUMMED, COLUMNS = 6, 8
_LIMIT = (tl.constexpr if HAS_TRITON else float)(MAX_LOG_RATIO)


@dataclass(frozen=True)
class LaunchConfig:
    """`block` tokens of a row at a time, over `num_warps` warps."""

    block: int
    num_warps: int


def launch_config(tokens: int) -> LaunchConfig:
    """One size for all `tokens`. Two tokens a thread keep eight running sums in registers; four spill under ptxas of
    Triton 3.6 and 3.9, and so do two over 8 warps, for its aim at a fuller multiprocessor."""
    return LaunchConfig(256, 4)


@jit
def _exp(x):
    """exp to about the accuracy of torch's. The GPU's own is exp2(x log2 e), whose error grows with |x|."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two pieces; the first has so few bits that its product with n is exact.
    r = (x - n * 0.693359375) + n * 2.12194440054690583e-4
    return tl.exp2(n) * tl.exp(r)


@jit
def _expm1_minus(d):
    """exp(d) - 1 - d, without the cancellation that eats it for small d."""
    s = 1.0 / 479001600 + d * (1.0 / 6227020800)
    s = 1.0 / 39916800 + d * s
    s = 1.0 / 3628800 + d * s
    s = 1.0 / 362880 + d * s
    s = 1.0 / 40320 + d * s
    s = 1.0 / 5040 + d * s
    s = 1.0 / 720 + d * s
    s = 1.0 / 120 + d * s
    s = 1.0 / 24 + d * s
    s = 1.0 / 6 + d * s
    s = 0.5 + d * s
    return tl.where(tl.abs(d) < 1.0, d * d * s, _exp(d) - 1.0 - d)


@jit
def _clamp(x, low, high):
    """The objective's: a NaN stays one, which tl.minimum and tl.maximum do not promise on every GPU."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@jit
def _ratio(x):
    """(rho, its derivative with respect to x)."""
    ratio = _exp(_clamp(x, -_LIMIT, _LIMIT))
    return ratio, tl.where((x >= -_LIMIT) & (x <= _LIMIT), ratio, 0.0)


@jit
def _policy(ratio, a, low, high, delta, FAMILY: tl.constexpr):
    """(V, dV/drho, D): the policy term is V + D logp, where D carries no gradient."""
    nothing = ratio * 0.0
    if FAMILY == 0:
        free = tl.where(ratio > delta, delta, ratio) * a
        held = _clamp(ratio, low, high) * a
        free_slope = tl.where(ratio <= delta, a, 0.0)
        held_slope = tl.where((ratio >= low) & (ratio <= high), a, 0.0)
        slope = tl.where(free < held, free_slope, tl.where(free > held, held_slope, 0.5 * (free_slope + held_slope)))
        value, slope, direct = -tl.where(held < free, held, free), -slope, nothing
    elif FAMILY == 1:
        tau = tl.where(a > 0.0, high, low)
        # Beyond 80 the gate is 0 or 1 to all of float32's digits.
        other = _exp(-_clamp(tau * (ratio - 1.0), -80.0, 80.0))
        gate = 1.0 / (1.0 + other)
        value, slope, direct = tl.div_rn(-4.0 * a, tau) * gate, -4.0 * a * gate * gate * other, nothing
    elif FAMILY == 2:
        value, slope, direct = nothing, nothing, -tl.where(ratio > high, high, ratio) * a
    else:
        value, slope, direct = nothing, nothing, nothing - a
    return value, slope, direct


@jit
def _kl(d, ESTIMATOR: tl.constexpr):
    """(KL, dKL/dlogp) of a sampled estimator at d = ref_logp - logp."""
    inside = (d >= -_LIMIT) & (d <= _LIMIT)
    d = _clamp(d, -_LIMIT, _LIMIT)
    if ESTIMATOR == 1:
        value, slope = -d, tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == 2:
        value, slope = 0.5 * d * d, -d
    else:
        value = _expm1_minus(d)
        slope = -(value + d)
    return value, tl.where(inside, slope, 0.0)


@jit
def _grpo_loss_kernel(
    logps,  # (B, T) float32, unit stride along T, like all that have T
    old_logps,  # (B, T) float32; logps itself where the ratio is 1
    ref_logps,  # (B, T) float32: log-probs for k1 to k3, the KL itself for exact, None without KL
    advantages,  # (B,) float32
    mask,  # (B, T) uint8, 0 where masked
    weights,  # (B, T) float32, of the policy term
    kl_weights,  # (B, T) float32, of the KL; None without KL
    entropy,  # (B, T) float32; logps itself where nobody reads the sum
    coefficient,  # (B, T) float32, contiguous, out
    kl_coefficient,  # (B, T) float32, contiguous, out; None unless exact
    partials,  # (B, 8) float32, contiguous, out
    T,
    logps_row,
    old_row,
    ref_row,
    mask_row,
    weights_row,
    kl_weights_row,
    entropy_row,
    beta,
    low,
    high,
    delta,
    corrected,
    ESTIMATOR: tl.constexpr,
    FAMILY: tl.constexpr,
    SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a = tl.load(advantages + row)
    # Numbers, not truth values: the interpreter loses the type of a scalar comparison when it is broadcast.
    negative, positive = (a < 0.0).to(tl.float32), (a > 0.0).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    # The loops are `while` because the interpreter of Triton 3.6 cannot make a range of a length under numpy 2.4.

    row_ratio, row_value, row_direct, row_pull, row_shift = 1.0, 0.0, 0.0, 0.0, 0.0
    if SEQUENCE:
        shift = tl.zeros((BLOCK,), tl.float32)
        count = tl.zeros((BLOCK,), tl.float32)
        weight = tl.zeros((BLOCK,), tl.float32)
        weighed_kl = tl.zeros((BLOCK,), tl.float32)
        start = 0
        while start < T:
            t = start + lanes
            m = tl.load(mask + row * mask_row + t, mask=t < T, other=0) != 0
            p = tl.load(logps + row * logps_row + t, mask=m, other=0.0)
            o = tl.load(old_logps + row * old_row + t, mask=m, other=0.0)
            shift += p - o
            count += m.to(tl.float32)
            weight += tl.load(weights + row * weights_row + t, mask=m, other=0.0)
            if (ESTIMATOR != 0) & (ESTIMATOR != 4):
                q = tl.load(ref_logps + row * ref_row + t, mask=m, other=0.0)
                estimate, _slope = _kl(q - p, ESTIMATOR)
                weighed_kl += estimate * tl.load(kl_weights + row * kl_weights_row + t, mask=m, other=0.0)
            start += BLOCK
        n = tl.maximum(tl.sum(count, 0), 1.0)
        row_shift = tl.div_rn(tl.sum(shift, 0), n)
        row_ratio, ratio_slope = _ratio(row_shift)
        row_value, slope, row_direct = _policy(row_ratio, a, low, high, delta, FAMILY)
        # All tokens of the row move its ratio, each by 1/n.
        of_ratio = tl.sum(weight, 0) * slope + corrected * beta * tl.sum(weighed_kl, 0)
        row_pull = tl.div_rn(of_ratio * ratio_slope, n)

    loss = tl.zeros((BLOCK,), tl.float32)
    kl_sum = tl.zeros((BLOCK,), tl.float32)
    low_clipped = tl.zeros((BLOCK,), tl.float32)
    high_clipped = tl.zeros((BLOCK,), tl.float32)
    entropy_sum = tl.zeros((BLOCK,), tl.float32)
    tokens = tl.zeros((BLOCK,), tl.float32)
    ratio_min = tl.full((BLOCK,), float("inf"), tl.float32)
    ratio_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    start = 0
    while start < T:
        t = start + lanes
        m = tl.load(mask + row * mask_row + t, mask=t < T, other=0) != 0
        p = tl.load(logps + row * logps_row + t, mask=m, other=0.0)
        w = tl.load(weights + row * weights_row + t, mask=m, other=0.0)
        if SEQUENCE:
            ratio = tl.zeros((BLOCK,), tl.float32) + row_ratio
            token_loss = w * (row_value + row_direct * p)
            pull = row_pull + w * row_direct
        else:
            o = tl.load(old_logps + row * old_row + t, mask=m, other=0.0)
            ratio, ratio_slope = _ratio(p - o)
            value, slope, direct = _policy(ratio, a, low, high, delta, FAMILY)
            token_loss = w * (value + direct * p)
            pull = w * (slope * ratio_slope + direct)
        if ESTIMATOR != 0:
            q = tl.load(ref_logps + row * ref_row + t, mask=m, other=0.0)
            u = beta * tl.load(kl_weights + row * kl_weights_row + t, mask=m, other=0.0)
            if ESTIMATOR == 4:
                kl = q
                tl.store(kl_coefficient + row * T + t, u, mask=t < T)
            else:
                kl, kl_slope = _kl(q - p, ESTIMATOR)
                before = tl.where(corrected > 0.0, ratio, 1.0)
                pull += u * before * kl_slope
                if not SEQUENCE:
                    pull += u * corrected * ratio_slope * kl
                kl = before * kl
            token_loss += u * kl
            kl_sum += tl.where(m, kl, 0.0)
        # Where m is false the weights are 0, but the advantage of a masked row may be NaN.
        tl.store(coefficient + row * T + t, tl.where(m, pull, 0.0), mask=t < T)
        loss += tl.where(m, token_loss, 0.0)
        if (FAMILY == 0) | (FAMILY == 2):
            counted = tl.where(ratio > delta, delta, ratio)
            low_clipped += tl.where(m & (counted < low), negative, 0.0)
            high_clipped += tl.where(m & (counted > high), positive, 0.0)
        tokens += m.to(tl.float32)
        ratio_min = tl.where(m & (ratio < ratio_min), ratio, ratio_min)
        ratio_max = tl.where(m & (ratio > ratio_max), ratio, ratio_max)
        entropy_sum += tl.load(entropy + row * entropy_row + t, mask=m, other=0.0)
        start += BLOCK

    out = partials + row * 8
    tl.store(out, tl.sum(loss, 0))
    tl.store(out + 1, tl.sum(kl_sum, 0))
    tl.store(out + 2, tl.sum(low_clipped, 0))
    tl.store(out + 3, tl.sum(high_clipped, 0))
    tl.store(out + 4, tl.sum(entropy_sum, 0))
    tl.store(out + 5, tl.sum(tokens, 0))
    tl.store(out + 6, -tl.min(ratio_min, 0))
    tl.store(out + 7, tl.max(ratio_max, 0))


def _rows(x: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """x (B, T) in `dtype` with unit stride along T; a copy only where it has to be."""
    if x is None:
        return None
    x = x.to(dtype)
    return x if x.stride(1) == 1 else x.contiguous()


def launch(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    factor: Tensor | None,
    entropy: Tensor | None,
    coefficient: Tensor,
    kl_coefficient: Tensor | None,
    partials: Tensor,
    *,
    bounds: tuple[float, float, float, float, float],
    estimator: int,
    family: int,
    sequence: bool,
) -> None:
    """Tensors as the kernel has them, inputs of any float dtype and strides, and `factor` (B, T) of the policy term.
    `bounds`: beta, low, high, delta and 1 where the KL takes the ratio; sapo's low and high are its temperatures."""
    rows, tokens = logps.shape
    p, q, h = _rows(logps), _rows(ref_logps), _rows(entropy)
    o = _rows(old_logps)
    m, u = _rows(mask.bool().view(torch.uint8), torch.uint8), _rows(weights)
    w = u if factor is None else _rows(weights.float() * factor)
    o, h = p if o is None else o, p if h is None else h
    u = u if estimator else None
    strides = [0 if x is None else x.stride(0) for x in (p, o, q, m, w, u, h)]
    config = launch_config(tokens)
    with torch.cuda.device_of(logps):
        _grpo_loss_kernel[(rows,)](
            p, o, q, advantages.float().contiguous(), m, w, u, h, coefficient, kl_coefficient, partials, tokens,
            *strides, *bounds, ESTIMATOR=estimator, FAMILY=family, SEQUENCE=sequence, BLOCK=config.block,
            num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip


def compile_cases(cc: int) -> list[CompileCase]:
    """Every kernel the launcher can ask for. float32 alone, so that no card needs a case of its own; a pointer that is
    not needed is another's, so that there are not twice as many kernels for each of them."""
    pointers = ("logps", "old_logps", "ref_logps", "advantages", "mask", "weights", "kl_weights", "entropy",
                "coefficient", "kl_coefficient", "partials")  # fmt: skip
    integers = ("T", "logps_row", "old_row", "ref_row", "mask_row", "weights_row", "kl_weights_row", "entropy_row")
    cases = []
    config = launch_config(1024)
    for estimator, family, sequence in product((0, *ESTIMATORS.values()), sorted({*FAMILIES.values()}), (False, True)):
        absent = {"ref_logps": not estimator, "kl_weights": not estimator,
                  "kl_coefficient": estimator != ESTIMATORS["exact"]}  # fmt: skip
        types = {n: None if absent.get(n) else "*u8:16" if n == "mask" else "*fp32:16" for n in pointers}
        types |= dict.fromkeys(integers, "i32")
        types |= dict.fromkeys(("beta", "low", "high", "delta", "corrected"), "fp32")
        flags = {"ESTIMATOR": estimator, "FAMILY": family, "SEQUENCE": sequence, "BLOCK": config.block}
        name = f"estimator {estimator}, family {family}, sequence {sequence}"
        cases.append(compile_case(name, _grpo_loss_kernel, types, flags, config.num_warps))
    return cases
