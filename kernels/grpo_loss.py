"""The GRPO loss, its gradient and its metrics in one launch.

`objective.grpo_loss` is the definition and this file's oracle; the elementwise launches there are one here. With m the
mask, w the weights, A the advantage of the row, d = ref_logp - logp:

    x     = logp - old_logp                              token level; exactly 0 without old log-probs
    x     = sum_t m (logp - old_logp) / n, n = sum_t m   sequence level, one number a row
    rho   = exp(clamp(x, -20, 20))
    L     = sum_it m w [ -min(min(rho, delta) A, clamp(rho, low, high) A) + beta KL ]
    KL    = -d,   d^2 / 2,   exp(d) - d - 1,   or given (exact)

    dL/dlogp_t = -w_t A s rho [|x| <= 20] + beta w_t KL'_t                       token level
    dL/dlogp_t = -(sum_u w_u) A s rho [|x| <= 20] / n + beta w_t KL'_t           sequence level: each token moves all
    KL'        = 1,   -d,   1 - exp(d)   for |d| <= 20, else 0;   dL/dkl_t = beta w_t for the exact KL

s is the slope of the min in rho as the oracle has it: that of the smaller branch (clamps pass gradient at their bounds,
not beyond), half of each where they are equal. A masked position is selected away, never multiplied by 0: it may hold
NaN or infinity in every input. An unmasked NaN makes the loss NaN, as it should.

One program a sequence, float32 throughout. Memory: dL/dlogp and, for the exact KL, dL/dkl, 4BT bytes each, plus 32B
bytes of row sums that torch adds up in a fixed order: no atomics, so equal inputs give equal bits. Each is read once;
sequence level reads four of them twice. The backward pass is one product with the incoming gradient.

Sources: those of objective.py. exp after Cody & Waite 1980.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import inf
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.runtime import CompileCase, jit, require_triton, tl
from torch import Tensor

from lowvram_grpo.objective import MAX_LOG_RATIO, Objective, check_kl

# What the kernel is compiled for; 0 is a loss without KL.
ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3, "exact": 4}
# Columns of the row sums. The first SUMMED are added up; the bounds, -min and max of the ratio, are folded by max.
LOSS, KL, LOW, HIGH, ENTROPY, TOKENS = range(6)
SUMMED, COLUMNS = 6, 8


class FusedLoss(NamedTuple):
    """One micro-batch. `loss` is a float32 scalar, differentiable in `logps` and `kl`; the rest carries no gradient.

    Sums and counts are float32 scalars over the unmasked tokens; `kl_sum` and `entropy_sum` are None where nothing was
    given to sum. Without a single token the ratio's bounds are +inf and -inf, which leaves any min and max as it was.
    """

    loss: Tensor
    coefficient: Tensor  # (B, T) float32 dL/dlogp, 0 where masked
    kl_coefficient: Tensor | None  # (B, T) float32 dL/dkl of an exact KL
    kl_sum: Tensor | None
    low_clipped: Tensor
    high_clipped: Tensor
    region_clipped: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    entropy_sum: Tensor | None
    tokens: Tensor


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
    """objective.py's: a NaN stays one, which tl.minimum and tl.maximum do not promise on every GPU."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@jit
def _surrogate(x, a, low, high, delta, LIMIT: tl.constexpr):
    """(rho, -min(..), its derivative with respect to x)."""
    ratio = _exp(_clamp(x, -LIMIT, LIMIT))
    free = tl.where(ratio > delta, delta, ratio) * a
    held = _clamp(ratio, low, high) * a
    free_slope = tl.where(ratio <= delta, a, 0.0)
    held_slope = tl.where((ratio >= low) & (ratio <= high), a, 0.0)
    slope = tl.where(free < held, free_slope, tl.where(free > held, held_slope, 0.5 * (free_slope + held_slope)))
    inside = (x >= -LIMIT) & (x <= LIMIT)
    return ratio, -tl.where(held < free, held, free), tl.where(inside, -slope * ratio, 0.0)


@jit
def _kl(d, ESTIMATOR: tl.constexpr, LIMIT: tl.constexpr):
    """(KL, dKL/dlogp) of a sampled estimator at d = ref_logp - logp."""
    inside = (d >= -LIMIT) & (d <= LIMIT)
    d = _clamp(d, -LIMIT, LIMIT)
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
    old_logps,  # (B, T) float32 or None
    ref_logps,  # (B, T) float32: log-probs for k1 to k3, the KL itself for exact, None without KL
    advantages,  # (B,) float32
    mask,  # (B, T) uint8, 0 where masked
    weights,  # (B, T) float32
    entropy,  # (B, T) float32 or None
    coefficient,  # (B, T) float32, contiguous, out
    kl_coefficient,  # (B, T) float32, contiguous, out; None unless exact
    partials,  # (B, 8) float32, contiguous, out
    T,
    logps_row,
    old_row,
    ref_row,
    mask_row,
    weights_row,
    entropy_row,
    beta,
    low,
    high,
    delta,
    ESTIMATOR: tl.constexpr,
    SEQUENCE: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a = tl.load(advantages + row)
    # Numbers, not truth values: the interpreter loses the type of a scalar comparison when it is broadcast.
    negative, positive = (a < 0.0).to(tl.float32), (a > 0.0).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    # The loops are `while` because the interpreter of Triton 3.6 cannot make a range of a length under numpy 2.4.

    row_ratio, row_loss, row_pull, row_shift = 1.0, 0.0, 0.0, 0.0
    if SEQUENCE:
        shift = tl.zeros((BLOCK,), tl.float32)
        count = tl.zeros((BLOCK,), tl.float32)
        weight = tl.zeros((BLOCK,), tl.float32)
        start = 0
        while start < T:
            t = start + lanes
            m = tl.load(mask + row * mask_row + t, mask=t < T, other=0) != 0
            p = tl.load(logps + row * logps_row + t, mask=m, other=0.0)
            o = p
            if HAS_OLD:
                o = tl.load(old_logps + row * old_row + t, mask=m, other=0.0)
            shift += p - o
            count += m.to(tl.float32)
            weight += tl.load(weights + row * weights_row + t, mask=m, other=0.0)
            start += BLOCK
        n = tl.maximum(tl.sum(count, 0), 1.0)
        row_shift = tl.div_rn(tl.sum(shift, 0), n)
        row_ratio, row_loss, row_slope = _surrogate(row_shift, a, low, high, delta, LIMIT)
        row_pull = tl.div_rn(tl.sum(weight, 0) * row_slope, n)

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
            token_loss = tl.zeros((BLOCK,), tl.float32) + row_loss
            pull = tl.zeros((BLOCK,), tl.float32) + row_pull
        else:
            o = p
            if HAS_OLD:
                o = tl.load(old_logps + row * old_row + t, mask=m, other=0.0)
            ratio, token_loss, slope = _surrogate(p - o, a, low, high, delta, LIMIT)
            pull = w * slope
        if ESTIMATOR != 0:
            q = tl.load(ref_logps + row * ref_row + t, mask=m, other=0.0)
            if ESTIMATOR == 4:
                kl = q
                tl.store(kl_coefficient + row * T + t, beta * w, mask=t < T)
            else:
                kl, kl_slope = _kl(q - p, ESTIMATOR, LIMIT)
                pull += beta * w * kl_slope
            token_loss += beta * kl
            kl_sum += tl.where(m, kl, 0.0)
        # Where m is false w is 0, but the advantage of a masked row may be NaN.
        tl.store(coefficient + row * T + t, tl.where(m, pull, 0.0), mask=t < T)
        loss += tl.where(m, token_loss * w, 0.0)
        low_clipped += tl.where(m & (ratio < low), negative, 0.0)
        high_clipped += tl.where(m & (ratio > high), positive, 0.0)
        tokens += m.to(tl.float32)
        ratio_min = tl.where(m & (ratio < ratio_min), ratio, ratio_min)
        ratio_max = tl.where(m & (ratio > ratio_max), ratio, ratio_max)
        if HAS_ENTROPY:
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


@torch.library.custom_op("lowvram_grpo::grpo_loss", mutates_args=())
def _grpo_loss_op(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    kl: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    entropy: Tensor | None,
    beta: float,
    low: float,
    high: float,
    delta: float,
    estimator: int,
    sequence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The launcher: loss (), coefficient (B, T), kl_coefficient (B, T) or (0, T), totals (6,), bounds (2,)."""
    require_triton("The fused GRPO loss", logps, "objective.grpo_loss")
    rows, tokens = logps.shape
    exact = estimator == ESTIMATORS["exact"]
    per_token = lambda count: torch.empty((count, tokens), dtype=torch.float32, device=logps.device)
    coefficient, kl_coefficient = per_token(rows), per_token(rows if exact else 0)
    nothing = [[0.0] * SUMMED + [-inf] * (COLUMNS - SUMMED)]
    partials = torch.empty((rows, COLUMNS), device=logps.device) if rows else coefficient.new_tensor(nothing)
    p, o, q = _rows(logps), _rows(old_logps), _rows(kl if exact else ref_logps)
    m, w, h = _rows(mask.bool().view(torch.uint8), torch.uint8), _rows(weights), _rows(entropy)
    row = lambda x: 0 if x is None else x.stride(0)
    config = launch_config(tokens)
    with torch.cuda.device_of(logps):
        _grpo_loss_kernel[(rows,)](
            p, o, q, advantages.float().contiguous(), m, w, h, coefficient, kl_coefficient if exact else None, partials,
            tokens, row(p), row(o), row(q), row(m), row(w), row(h), beta, low, high, delta,
            ESTIMATOR=estimator, SEQUENCE=sequence, HAS_OLD=o is not None, HAS_ENTROPY=h is not None,
            LIMIT=MAX_LOG_RATIO, BLOCK=config.block, num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    totals, bounds = partials[:, :SUMMED].sum(0), partials[:, SUMMED:].amax(0)
    # The loss must own its memory: an output of an op may not be a view of another.
    return totals[LOSS].clone(), coefficient, kl_coefficient, totals, bounds


@_grpo_loss_op.register_fake
def _(logps, old_logps, ref_logps, kl, advantages, mask, weights, entropy, beta, low, high, delta, estimator, sequence):
    rows, tokens = logps.shape
    new = lambda *shape: logps.new_empty(shape, dtype=torch.float32)
    kl_rows = rows if estimator == ESTIMATORS["exact"] else 0
    return new(), new(rows, tokens), new(kl_rows, tokens), new(SUMMED), new(COLUMNS - SUMMED)


def _setup_context(ctx, inputs, output) -> None:
    logps, kl = inputs[0], inputs[3]
    _, coefficient, kl_coefficient, totals, bounds = output
    ctx.mark_non_differentiable(coefficient, kl_coefficient, totals, bounds)
    ctx.save_for_backward(coefficient, kl_coefficient)
    ctx.dtypes = logps.dtype, None if kl is None else kl.dtype


def _backward(ctx, grad_loss, *_):
    coefficient, kl_coefficient = ctx.saved_tensors
    dtype, kl_dtype = ctx.dtypes
    d_logps = (grad_loss * coefficient).to(dtype)
    d_kl = (grad_loss * kl_coefficient).to(kl_dtype) if kl_dtype is not None and ctx.needs_input_grad[3] else None
    return d_logps, None, None, d_kl, *[None] * 10


_grpo_loss_op.register_autograd(_backward, setup_context=_setup_context)


def fused_grpo_loss(
    logps: Tensor,  # (B, T) any float dtype but float64, any strides, like all that follow
    old_logps: Tensor | None,  # (B, T), or None for the first update of a rollout: the ratio is then exactly 1
    ref_logps: Tensor | None,  # (B, T), or None without KL; not read with kl_estimator "exact"
    advantages: Tensor,  # (B,)
    mask: Tensor,  # (B, T) nonzero where a token counts
    weights: Tensor,  # (B, T) from objective.token_weights: the loss types differ in nothing else
    objective: Objective,
    kl: Tensor | None = None,  # (B, T) the exact KL, with kl_estimator "exact" alone
    entropy: Tensor | None = None,  # (B, T), only summed up
) -> FusedLoss:
    """`objective.grpo_loss` in one launch, its gradient and metrics included.

    Differentiable once, in `logps` and `kl` only. Works on meta and fake tensors.

    Raises:
        ValueError: shapes that do not fit, float64 (which the kernel would round), an unknown estimator, or a KL that
            does not belong to the estimator.
        RuntimeError: no Triton, or a tensor that is not on a GPU while kernels are not interpreted.
    """
    check_kl(objective, ref_logps, kl)
    if objective.kl_estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {objective.kl_estimator!r}")
    if logps.dtype == torch.float64:
        raise ValueError("the fused GRPO loss computes in float32; objective.grpo_loss keeps float64.")
    for name, x in {"old_logps": old_logps, "ref_logps": ref_logps, "kl": kl, "mask": mask, "weights": weights,
                    "entropy": entropy}.items():  # fmt: skip
        if x is not None and x.shape != logps.shape:
            raise ValueError(f"{name} {tuple(x.shape)} does not fit logps {tuple(logps.shape)}")
    if logps.ndim != 2 or advantages.shape != logps.shape[:1]:
        raise ValueError(f"advantages {tuple(advantages.shape)} do not fit logps {tuple(logps.shape)}")
    has_kl = kl is not None or ref_logps is not None
    loss, coefficient, kl_coefficient, totals, bounds = _grpo_loss_op(
        logps, old_logps, ref_logps, kl, advantages, mask, weights, entropy,
        float(objective.beta), 1.0 - objective.epsilon, 1.0 + objective.upper,
        inf if objective.delta is None else float(objective.delta),
        ESTIMATORS[objective.kl_estimator] if has_kl else 0, objective.importance_sampling_level == "sequence",
    )  # fmt: skip
    return FusedLoss(
        loss=loss,
        coefficient=coefficient,
        kl_coefficient=None if kl is None else kl_coefficient,
        kl_sum=totals[KL] if has_kl else None,
        low_clipped=totals[LOW],
        high_clipped=totals[HIGH],
        region_clipped=totals[LOW] + totals[HIGH],  # no token is both: the advantage has one sign
        ratio_min=-bounds[0],
        ratio_max=bounds[1],
        entropy_sum=None if entropy is None else totals[ENTROPY],
        tokens=totals[TOKENS],
    )


def compile_cases(cc: int) -> list[CompileCase]:
    """Every kernel the launcher can ask for. float32 alone, so that no card needs a case of its own."""
    pointers = ("logps", "old_logps", "ref_logps", "advantages", "mask", "weights", "entropy", "coefficient",
                "kl_coefficient", "partials")  # fmt: skip
    integers = ("T", "logps_row", "old_row", "ref_row", "mask_row", "weights_row", "entropy_row")
    cases = []
    config = launch_config(1024)
    for estimator, sequence, old, entropy in product((0, *ESTIMATORS.values()), *[(False, True)] * 3):
        absent = {"old_logps": not old, "ref_logps": not estimator, "entropy": not entropy,
                  "kl_coefficient": estimator != ESTIMATORS["exact"]}  # fmt: skip
        signature = {n: "constexpr" if absent.get(n) else "*u8:16" if n == "mask" else "*fp32:16" for n in pointers}
        signature |= dict.fromkeys(integers, "i32") | dict.fromkeys(("beta", "low", "high", "delta"), "fp32")
        flags = {"ESTIMATOR": estimator, "SEQUENCE": sequence, "HAS_OLD": old, "HAS_ENTROPY": entropy,
                 "LIMIT": MAX_LOG_RATIO, "BLOCK": config.block}  # fmt: skip
        signature |= dict.fromkeys(flags, "constexpr")
        name = f"estimator {estimator}, sequence {sequence}, old {old}, entropy {entropy}"
        constexprs = flags | {n: None for n in pointers if absent.get(n)}
        cases.append(CompileCase(name, _grpo_loss_kernel, signature, constexprs, config.num_warps))
    return cases
