"""The GRPO loss, its gradient and its metrics in one launch.

`objective.grpo_loss` is the definition and this file's oracle; the elementwise launches there are one here. With m the
mask, w the weights, f the factor, A the advantage of the row, d = ref_logp - logp:

    x     = logp - old_logp                              token level; exactly 0 without old log-probs
    x     = sum_t m (logp - old_logp) / n, n = sum_t m   sequence level, one number a row
    rho   = exp(clamp(x, -20, 20)),  rho' = rho where |x| <= 20, else 0
    L     = sum_it m w [ f (V + D logp) + beta c KL ]    c = rho where the KL is corrected, else 1

                            V                                                  D
    grpo and its kin        -min(min(rho, delta) A, clamp(rho, low, high) A)   0
    sapo                    -4 A s / tau,  s = sigmoid(tau (rho - 1))          0
    cispo, vespo            0                                                  -min(rho, high) A,  -A

    KL    = -d,   d^2 / 2,   exp(d) - d - 1,   or given (exact)
    KL'   = 1,   -d,   1 - exp(d)   for |d| <= 20, else 0

    dL/dlogp_t = w_t f_t (V' rho' + D) + beta w_t (c KL'_t + c' KL_t)                                 token level
    dL/dlogp_t = w_t f_t D + beta w_t c KL'_t + rho' / n sum_u w_u (f_u V' + beta c'/rho' KL_u)       sequence level
    dL/dkl_t   = beta w_t                                                                             the exact KL

where c' is rho' for a corrected KL and else 0: at sequence level each token moves the ratio of all. V' is the slope in
rho as the oracle has it; of the min that of the smaller branch (clamps pass gradient at their bounds, not beyond), half
of each where they are equal. A masked position is selected away, never multiplied by 0: it may hold
NaN or infinity in every input. An unmasked NaN makes the loss NaN, as it should.

Memory: dL/dlogp and, for the exact KL, dL/dkl, 4BT bytes each, plus 32B bytes of row sums that torch adds up in a fixed
order: no atomics, so equal inputs give equal bits. The backward pass is one product with the incoming gradient.

Sources: those of objective/loss.py.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.grpo_loss_kernel import (
    COLUMNS,
    ENTROPY,
    ESTIMATORS,
    FAMILIES,
    HIGH,
    KL,
    LOSS,
    LOW,
    SUMMED,
    TOKENS,
    launch,
)
from lowvram_grpo.kernels.runtime import require_triton
from torch import Tensor

from lowvram_grpo.objective import CLIPPED, Objective, check_factor, check_kl


class FusedLoss(NamedTuple):
    """One micro-batch. `loss` is a float32 scalar, differentiable in `logps` and `kl`; the rest carries no gradient.

    Sums are float32 scalars over the unmasked tokens, counts are (B,), one a completion; `kl_sum` and `entropy_sum` are
    None where nothing was given to sum. Without a single token the ratio's bounds are +inf and -inf, which leaves any
    min and max as it was.
    """

    loss: Tensor
    coefficient: Tensor  # (B, T) float32 dL/dlogp, 0 where masked
    kl_coefficient: Tensor | None  # (B, T) float32 dL/dkl of an exact KL
    kl_sum: Tensor | None
    low_clipped: Tensor  # (B,)
    high_clipped: Tensor  # (B,)
    ratio_min: Tensor
    ratio_max: Tensor
    entropy_sum: Tensor | None
    tokens: Tensor  # (B,)


@torch.library.custom_op("lowvram_grpo::grpo_loss", mutates_args=())
def _grpo_loss_op(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    kl: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    factor: Tensor | None,
    entropy: Tensor | None,
    beta: float,
    low: float,
    high: float,
    delta: float,
    corrected: bool,
    estimator: int,
    family: int,
    sequence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The launcher: loss (), coefficient (B, T), kl_coefficient (B, T) or (0, T), the rows' sums and bounds (B, 8);
    without a row one that holds nothing."""
    require_triton("The fused GRPO loss", logps, "objective.grpo_loss")
    rows, tokens = logps.shape
    exact = estimator == ESTIMATORS["exact"]
    per_token = lambda count: torch.empty((count, tokens), dtype=torch.float32, device=logps.device)
    coefficient, kl_coefficient = per_token(rows), per_token(rows if exact else 0)
    nothing = [[0.0] * SUMMED + [-inf] * (COLUMNS - SUMMED)]
    partials = torch.empty((rows, COLUMNS), device=logps.device) if rows else coefficient.new_tensor(nothing)
    launch(
        logps, old_logps, kl if exact else ref_logps, advantages, mask, weights, factor, entropy, coefficient,
        kl_coefficient if exact else None, partials, bounds=(beta, low, high, delta, float(corrected)),
        estimator=estimator, family=family, sequence=sequence,
    )  # fmt: skip
    return partials[:, LOSS].sum(), coefficient, kl_coefficient, partials


@_grpo_loss_op.register_fake
def _(logps, old_logps, ref_logps, kl, advantages, mask, weights, factor, entropy, beta, low, high, delta, corrected,
      estimator, family, sequence):  # fmt: skip
    rows, tokens = logps.shape
    new = lambda *shape: logps.new_empty(shape, dtype=torch.float32)
    kl_rows = rows if estimator == ESTIMATORS["exact"] else 0
    return new(), new(rows, tokens), new(kl_rows, tokens), new(max(rows, 1), COLUMNS)


def _setup_context(ctx, inputs, output) -> None:
    logps, kl = inputs[0], inputs[3]
    _, coefficient, kl_coefficient, partials = output
    ctx.mark_non_differentiable(coefficient, kl_coefficient, partials)
    ctx.save_for_backward(coefficient, kl_coefficient)
    ctx.dtypes = logps.dtype, None if kl is None else kl.dtype


def _backward(ctx, grad_loss, *_):
    coefficient, kl_coefficient = ctx.saved_tensors
    dtype, kl_dtype = ctx.dtypes
    d_logps = (grad_loss * coefficient).to(dtype)
    d_kl = (grad_loss * kl_coefficient).to(kl_dtype) if kl_dtype is not None and ctx.needs_input_grad[3] else None
    return d_logps, None, None, d_kl, *[None] * 13


_grpo_loss_op.register_autograd(_backward, setup_context=_setup_context)


def fused_grpo_loss(
    logps: Tensor,  # (B, T) any float dtype but float64, any strides, like all that follow
    old_logps: Tensor | None,  # (B, T), or None for the first update of a rollout: the ratio is then exactly 1
    ref_logps: Tensor | None,  # (B, T), or None without KL; not read with kl_estimator "exact"
    advantages: Tensor,  # (B,)
    mask: Tensor,  # (B, T) nonzero where a token counts
    weights: Tensor,  # (B, T) from objective.token_weights
    objective: Objective,
    kl: Tensor | None = None,  # (B, T) the exact KL, with kl_estimator "exact" alone
    factor: Tensor | None = None,  # (B, T) without gradient, times the policy term alone
    entropy: Tensor | None = None,  # (B, T), only summed up
) -> FusedLoss:
    """`objective.grpo_loss` in one launch, its gradient and metrics included; one more multiplies a `factor` in.

    Differentiable once, in `logps` and `kl` only. Works on meta and fake tensors.

    Raises:
        ValueError: shapes that do not fit, float64 (which the kernel would round), an unknown estimator or loss type,
            a KL that does not belong to the estimator, or vespo without a factor.
        RuntimeError: no Triton, or a tensor that is not on a GPU while kernels are not interpreted.
    """
    check_kl(objective, ref_logps, kl)
    check_factor(objective, factor)
    if objective.kl_estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {objective.kl_estimator!r}")
    if logps.dtype == torch.float64:
        raise ValueError("the fused GRPO loss computes in float32; objective.grpo_loss keeps float64.")
    for name, x in {"old_logps": old_logps, "ref_logps": ref_logps, "kl": kl, "mask": mask, "weights": weights,
                    "factor": factor, "entropy": entropy}.items():  # fmt: skip
        if x is not None and x.shape != logps.shape:
            raise ValueError(f"{name} {tuple(x.shape)} does not fit logps {tuple(logps.shape)}")
    if logps.ndim != 2 or advantages.shape != logps.shape[:1]:
        raise ValueError(f"advantages {tuple(advantages.shape)} do not fit logps {tuple(logps.shape)}")
    has_kl = kl is not None or ref_logps is not None
    loss, coefficient, kl_coefficient, partials = _grpo_loss_op(
        logps, old_logps, ref_logps, kl, advantages, mask, weights, factor, entropy, float(objective.beta),
        *_bounds(objective), objective.corrects_kl, ESTIMATORS[objective.kl_estimator] if has_kl else 0,
        FAMILIES[objective.loss_type], objective.per_sequence,
    )  # fmt: skip
    of_rows, bounds = partials[: len(logps)], partials[:, SUMMED:].amax(0)
    return FusedLoss(
        loss=loss,
        coefficient=coefficient,
        kl_coefficient=None if kl is None else kl_coefficient,
        kl_sum=partials[:, KL].sum() if has_kl else None,
        low_clipped=of_rows[:, LOW],
        high_clipped=of_rows[:, HIGH],
        ratio_min=-bounds[0],
        ratio_max=bounds[1],
        entropy_sum=None if entropy is None else partials[:, ENTROPY].sum(),
        tokens=of_rows[:, TOKENS],
    )


def _bounds(objective: Objective) -> tuple[float, float, float]:
    """(low, high, delta) as the kernel's families have them."""
    if objective.loss_type == "sapo":
        return float(objective.sapo_temperature_neg), float(objective.sapo_temperature_pos), inf
    if objective.loss_type not in CLIPPED:
        return -inf, float(objective.upper), inf
    return 1.0 - objective.epsilon, 1.0 + objective.upper, inf if objective.delta is None else float(objective.delta)
