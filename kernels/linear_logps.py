"""From hidden states to per-token log-probs, entropy and KL in one sweep over the vocabulary.

For N scored tokens with hidden state h, target t and temperature T, with l = softcap(scale * (W h + b)) / T:

    logp = l_t - lse(l)          entropy = lse(l) - sum_v p_v l_v          KL = sum_v p_v (log p_v - log q_v)
    d logp / d h = scale / T * (s_t W_t - sum_v p_v s_v W_v),   s = d softcap (1 without soft-capping)
    d KL / d h = scale / T * sum_v p_v (log p_v - log q_v - KL) s_v W_v
    d entropy / d h = -scale / T * sum_v p_v (log p_v + entropy) s_v W_v

where q are the probabilities under reference hidden states; the last is the line above it for a uniform q, as then
KL = log V - entropy. The sums over v in the gradient are found during the sweep, before the loss is known: as a short
list of probable entries for most rows of a trained model (2NVH FLOP forward and backward together, whichever of the
three are differentiated), as a dense online product for diffuse rows (4NVH, and 2NVH more for each of KL and entropy);
see `sweep/sweep.py`, `sweep/direction.py`. A trainable head recomputes its logits instead (8NVH,
`sweep/trainable_head.py`).

Memory: `workspace_mib`, a few hundred bytes for a listed row, H floats for a diffuse one (H more for each of KL and
entropy that is differentiated). Logits are float32 from
float32 accumulation, and no N x V tensor is made on any device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.products import compute_dtype
from lowvram_grpo.kernels.sweep.autograd import FrozenHead, SweepSettings, run_sweep, sweep_op
from lowvram_grpo.kernels.sweep.plan import DirectionParams
from lowvram_grpo.kernels.sweep.trainable_head import TrainableHead
from lowvram_grpo.kernels.transform import Transform
from torch import Tensor


class LinearLogps(NamedTuple):
    """float32 tensors of shape (N,); None where not asked for. `logps`, `kl` and, with `entropy_gradient`, `entropy`
    are differentiable, the rest is not.

    Attributes:
        bound: the most by which |d logp / d hidden| of each row can be wrong because its list is short; 0 where the
            dense product was taken, None without a gradient.
        kl_bound, entropy_bound: the same for |d kl / d hidden| and |d entropy / d hidden|.
        diffuse: (Nd,) int64, the rows that took the dense product, None without a gradient.
    """

    logps: Tensor
    entropy: Tensor | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    bound: Tensor | None = None
    kl_bound: Tensor | None = None
    diffuse: Tensor | None = None
    entropy_bound: Tensor | None = None


def linear_logps(
    hidden: Tensor,  # (N, H), any float dtype, any strides
    head: Head | Tensor,  # or its weight (V, H)
    targets: Tensor,  # (N,) int64
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    entropy: bool = False,
    entropy_gradient: bool = False,
    workspace_mib: int = 64,
    ref_hidden: Tensor | None = None,  # (N, H)
    kl: bool = False,
    wanted: Tensor | None = None,  # (N,) bool
    direction: DirectionParams | str = "auto",
    path: str | None = None,
) -> LinearLogps:
    """Log-prob of `targets` under `softmax(softcap(scale * head(hidden)) / temperature)`, without N x V logits.

    Differentiable in `hidden`, and in the head's weight and bias where they require grad.

    Args:
        softcap, logit_scale: override those of a `Head`.
        entropy: also return the entropy of each row, in nats.
        entropy_gradient: make it differentiable, from the same sweep; also for passes that shall have the same bits.
        workspace_mib: memory for tiles, in MiB, whatever N, V and H.
        ref_hidden: hidden states of a reference under the same head, swept along; yields `ref_logps`.
        kl: with `ref_hidden`, also return the exact KL(policy || reference) over the whole vocabulary, in nats.
        wanted: rows that need a gradient; the others get none, whatever the loss says. All rows if left out.
        direction: `auto`, `sparse`, `dense`, or all of it as DirectionParams.
        path: `fused`, `cublas` or `torch`; the launch decision's if left out.

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, a temperature that is not positive, a
            reference with a head that is being trained, the gradient of an entropy that is not asked for, a path that
            the device cannot take.
    """
    head = Head(head) if isinstance(head, Tensor) else head
    if softcap is not None or logit_scale is not None:
        scale = head.logit_scale if logit_scale is None else logit_scale
        head = Head(head.weight, head.bias, scale, head.softcap if softcap is None else softcap)
    traced = torch.compiler.is_compiling() or type(hidden) not in (Tensor, torch.nn.Parameter)
    _check(hidden, head, targets, temperature, ref_hidden, kl, traced)
    _check_entropy(entropy, entropy_gradient)
    params = DirectionParams(direction) if isinstance(direction, str) else direction
    trainable = head.trainable and torch.is_grad_enabled()
    want_grad = torch.is_grad_enabled() and hidden.requires_grad and not trainable
    settings = SweepSettings(
        temperature, params.mode, params.epsilon, params.capacity, params.max_tail, path,
        compute_dtype(hidden, path), workspace_mib, want_grad, want_grad and kl, entropy_gradient,
    )  # fmt: skip
    if trainable:
        logps, ent = _through_a_trainable_head(hidden, head, targets, ref_hidden, settings)
        return LinearLogps(logps, ent if entropy else None)
    ref_hidden = None if ref_hidden is None else ref_hidden.detach()
    lists = want_grad and params.mode != "dense"
    mean, radius = head.centre(hidden.device) if lists else (torch.zeros(head.shape[1], device=hidden.device), None)
    # With soft-capping nothing is put on the mean row, for its share of the slopes is unknown.
    mean = mean if head.softcap is None else torch.zeros_like(mean)
    if traced:
        tensors, numbers = head.flatten()
        out = sweep_op(hidden, ref_hidden, tensors, numbers, targets, wanted, mean, *settings)
        logps, ent, ref_logps, full_kl, tail, spread, entropy_tail, diffuse = *out[:4], out[9], out[16], *out[11:13]
        ent = ent if settings.want_entropy_grad else ent.detach()
    else:
        logps, ent, ref_logps, full_kl, tail, spread, entropy_tail, diffuse = FrozenHead.apply(
            hidden, ref_hidden, head, targets, wanted, mean, settings
        )
    # A sum of at most `capacity` float32 probabilities is itself not exact.
    within = lambda missing: (missing + 2.0**-20) * (radius * abs(head.logit_scale) / temperature) if lists else None
    return LinearLogps(
        logps,
        ent if entropy else None,
        None if ref_hidden is None else ref_logps,
        full_kl if kl else None,
        within(tail),
        within(spread) if kl else None,
        diffuse if want_grad else None,
        within(_entropy_spread(ent.detach(), tail, entropy_tail, params)) if settings.want_entropy_grad else None,
    )


def _entropy_spread(entropy: Tensor, tail: Tensor, entropy_tail: Tensor, params: DirectionParams) -> Tensor:
    """(N,) the most that sum |p (log p + entropy)| over what a row's list lacks can be.

    Terms of one sign sum up to `entropy_tail`. All have it unless some of what is missing, of probability epsilon at
    most, is more probable than exp(-entropy).
    """
    return entropy_tail.abs() + 2 * tail * (entropy + math.log(params.epsilon)).clamp(min=0)


def _check(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, ref_hidden: Tensor | None, kl: bool, traced: bool
) -> None:
    vocab, width = head.shape
    if hidden.ndim != 2 or hidden.shape[1] != width or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} do not fit a head of {(vocab, width)}"
        )
    if ref_hidden is not None and ref_hidden.shape != hidden.shape:
        raise ValueError(f"ref_hidden {tuple(ref_hidden.shape)} has not the shape of hidden {tuple(hidden.shape)}")
    if kl and ref_hidden is None:
        raise ValueError("the exact KL needs ref_hidden")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if (
        not traced and targets.device.type == "cpu" and targets.numel()
        and not (int(targets.min()) >= 0 and int(targets.max()) < vocab)
    ):  # fmt: skip
        raise ValueError(f"a target lies outside the vocabulary of {vocab}")


def _check_entropy(asked: bool, gradient: bool) -> None:
    if gradient and not asked:
        raise ValueError("entropy_gradient needs entropy=True")


def _through_a_trainable_head(
    hidden: Tensor, head: Head, targets: Tensor, ref_hidden: Tensor | None, settings: SweepSettings
) -> tuple[Tensor, Tensor]:
    """(logps, entropy), differentiable in the head too."""
    if ref_hidden is not None:
        raise ValueError("a reference cannot share the sweep of a head that is being trained")
    if not head.dense:
        raise ValueError("the bias of a quantized head cannot be trained; freeze it")
    transform = Transform(head.logit_scale, head.softcap, settings.temperature)
    sweep_once = lambda weights: run_sweep(hidden.detach(), None, weights, targets, None, settings)
    return TrainableHead.apply(
        hidden, head.weight, head.bias, targets, sweep_once, transform, settings.dtype, settings.workspace_mib,
        settings.entropy_gradient,
    )  # fmt: skip


def linear_logps_ref(
    hidden: Tensor, head: Head, targets: Tensor, *, temperature: float = 1.0, ref_hidden: Tensor | None = None
) -> LinearLogps:
    """The same with full logits, in the dtype of its inputs (use float64): the oracle of the tests."""

    def log_softmax(h: Tensor) -> Tensor:
        logits = h @ head.weight.T
        if head.bias is not None:
            logits = logits + head.bias
        logits = logits * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return torch.log_softmax(logits / temperature, -1)

    logp = log_softmax(hidden)
    pick = lambda x: x.gather(1, targets[:, None])[:, 0]
    found = LinearLogps(pick(logp), -(logp.exp() * logp).sum(-1))
    if ref_hidden is None:
        return found
    ref = log_softmax(ref_hidden)
    return found._replace(ref_logps=pick(ref), kl=(logp.exp() * (logp - ref)).sum(-1))
