"""From hidden states to per-token log-probs, entropy and KL in one sweep over the vocabulary.

For N scored tokens with hidden state h, target t and temperature T, with l = softcap(scale * (W h + b)) / T:

    logp = l_t - lse(l)          entropy = lse(l) - sum_v p_v l_v          KL = sum_v p_v (log p_v - log q_v)
    d logp / d h = scale / T * (s_t W_t - sum_v p_v s_v W_v),   s = d softcap (1 without soft-capping)

where q are the probabilities under reference hidden states. The sum over v in the gradient is found during the sweep,
before the loss is known: as a short list of probable entries for most rows of a trained model (2NVH FLOP forward and
backward together), as a dense online product for diffuse rows (4NVH); see `sweep.py`, `direction.py`. A trainable head
recomputes its logits instead (8NVH, `trainable_head.py`).

Memory: `workspace_mib`, a few hundred bytes for a listed row, H floats for a diffuse one. Logits are float32 from
float32 accumulation, and no N x V tensor is made on any device.

In eager mode the sweep runs as a plain autograd.Function, so that a ledger or a FLOP counter sees every operator in it;
under torch.compile it is the opaque operator `lowvram_grpo::sweep`, which has a fake implementation and a backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.logits import compute_dtype
from lowvram_grpo.kernels.sweep.direction import Entries, sparse_direction
from lowvram_grpo.kernels.sweep.fold import Transform
from lowvram_grpo.kernels.sweep.launch import launch_config
from lowvram_grpo.kernels.sweep.sweep import DirectionParams, Swept, sweep, without_autocast
from lowvram_grpo.kernels.sweep.trainable_head import TrainableHead
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowvram_grpo.policy.head import Head


class LinearLogps(NamedTuple):
    """float32 tensors of shape (N,); None where not asked for. `logps` and `kl` are differentiable, the rest is not.

    Attributes:
        bound: the most by which |d logp / d hidden| of each row can be wrong because its list is short; 0 where the
            dense product was taken, None without a gradient.
        kl_bound: the same for |d kl / d hidden|.
        diffuse: (Nd,) int64, the rows that took the dense product, None without a gradient.
    """

    logps: Tensor
    entropy: Tensor | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    bound: Tensor | None = None
    kl_bound: Tensor | None = None
    diffuse: Tensor | None = None


class _Settings(NamedTuple):
    """What is neither a tensor nor differentiable."""

    temperature: float
    mode: str
    epsilon: float
    capacity: int
    max_tail: float
    path: str | None
    dtype: torch.dtype
    workspace_mib: int
    want_grad: bool
    want_kl_grad: bool


def _forward(
    hidden: Tensor, ref_hidden: Tensor | None, head: Head, targets: Tensor, wanted: Tensor | None, at: _Settings
) -> Swept:
    launch = launch_config(hidden.device, at.dtype, hidden.shape[1], has_ref=ref_hidden is not None, path=at.path)
    with without_autocast(hidden), torch.no_grad(), torch.cuda.device_of(hidden):
        return sweep(
            hidden, ref_hidden, head, targets, wanted, temperature=at.temperature,
            params=DirectionParams(at.mode, at.epsilon, at.capacity, at.max_tail), launch=launch, dtype=at.dtype,
            workspace_mib=at.workspace_mib, want_grad=at.want_grad, want_kl_grad=at.want_kl_grad,
        )  # fmt: skip


def _backward(
    c: Tensor,
    e: Tensor | None,
    entries: Entries,
    diffuse: Tensor,
    g: Tensor,
    g_kl: Tensor,
    mean: Tensor,
    head: Head,
    dtype: torch.dtype,
    at: _Settings,
    ends: list[int] | None,
) -> Tensor:
    """dL/d hidden (N, H) of `dtype` from c = dL/d logp and e = dL/d KL, both (N,). `ends` as in `sparse_direction`."""
    path = launch_config(c.device, at.dtype, head.shape[1], path=at.path).path
    factor = head.logit_scale / at.temperature
    with torch.cuda.device_of(c):
        d_hidden = sparse_direction(
            head, entries, c.float().contiguous(), None if e is None else e.float().contiguous(), mean, factor, dtype,
            use_triton=path != "torch", workspace_mib=at.workspace_mib, ends=ends,
        )  # fmt: skip
    step = max(1, 2**20 // head.shape[1])
    for k0 in range(0, len(diffuse), step):
        rows, part = diffuse[k0 : k0 + step], slice(k0, k0 + step)
        d = c[rows, None] * g[part]
        if e is not None:
            d += e[rows, None] * g_kl[part]
        d_hidden[rows] = d.to(dtype)
    return d_hidden


class _FrozenHead(torch.autograd.Function):
    """(logps, entropy, ref_logps, kl, tail, spread, diffuse); gradient to the hidden states only."""

    @staticmethod
    def forward(ctx, hidden, ref_hidden, head, targets, wanted, mean, at):
        swept = _forward(hidden, ref_hidden, head, targets, wanted, at)
        ctx.save_for_backward(*swept.entries, swept.diffuse, swept.g, swept.g_kl, mean)
        ctx.head, ctx.dtype, ctx.at, ctx.ends = head, hidden.dtype, at, swept.ends
        plain = swept.entropy, swept.ref_logps, swept.entries.tail, swept.kl_spread, swept.diffuse
        ctx.mark_non_differentiable(*plain)
        ctx.set_materialize_grads(False)
        return swept.logps, swept.entropy, swept.ref_logps, swept.kl, swept.entries.tail, swept.kl_spread, swept.diffuse

    @staticmethod
    @once_differentiable
    def backward(ctx, c, _entropy, _ref, e, *_):
        *entries, diffuse, g, g_kl, mean = ctx.saved_tensors
        d_hidden = _gradient(c, e, Entries(*entries), diffuse, g, g_kl, mean, ctx.head, ctx.dtype, ctx.at, ctx.ends)
        return d_hidden, None, None, None, None, None, None


def _gradient(c, e, entries, diffuse, g, g_kl, mean, head, dtype, at, ends=None):
    """`_backward` for gradients that may be absent."""
    if c is None and e is None:
        return None
    e = e if at.want_kl_grad else None
    c = torch.zeros_like(e) if c is None else c
    return _backward(c, e, entries, diffuse, g, g_kl, mean, head, dtype, at, ends)


@torch.library.custom_op("lowvram_grpo::sweep", mutates_args=())
def _sweep_op(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    head: Sequence[Tensor],
    numbers: Sequence[float],
    targets: Tensor,
    wanted: Tensor | None,
    mean: Tensor,
    temperature: float,
    mode: str,
    epsilon: float,
    capacity: int,
    max_tail: float,
    path: str | None,
    dtype: torch.dtype,
    workspace_mib: int,
    want_grad: bool,
    want_kl_grad: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """The sweep as an operator; outputs are the fields of `Swept`, its entries unpacked."""
    at = _Settings(temperature, mode, epsilon, capacity, max_tail, path, dtype, workspace_mib, want_grad, want_kl_grad)
    swept = _forward(hidden, ref_hidden, Head.unflatten(list(head), list(numbers)), targets, wanted, at)
    return (*swept[:4], *swept.entries, *swept[5:9])


@_sweep_op.register_fake
def _(hidden, ref_hidden, head, numbers, targets, wanted, mean, *settings):
    at = _Settings(*settings)
    n, width = hidden.shape
    fake = lambda *shape, of=torch.float32: torch.empty(*shape, dtype=of, device=hidden.device)
    entries = diffuse = 0
    if at.want_grad:
        context = torch.library.get_ctx()
        entries, diffuse = context.new_dynamic_size(), context.new_dynamic_size()
    ref, kl = n if ref_hidden is not None else 0, at.want_kl_grad
    return (
        fake(n), fake(n), fake(ref), fake(ref), fake(n + 1, of=torch.long), fake(entries, of=torch.int32),
        fake(entries), fake(entries if kl else 0), fake(n), fake(n if kl else 0), fake(diffuse, of=torch.long),
        fake(diffuse, width), fake(diffuse if kl else 0, width), fake(n if kl else 0),
    )  # fmt: skip


@torch.library.custom_op("lowvram_grpo::sweep_backward", mutates_args=())
def _sweep_backward_op(
    c: Tensor | None,
    e: Tensor | None,
    entries: Sequence[Tensor],
    diffuse: Tensor,
    g: Tensor,
    g_kl: Tensor,
    mean: Tensor,
    head: Sequence[Tensor],
    numbers: Sequence[float],
    hidden_dtype: torch.dtype,
    temperature: float,
    path: str | None,
    dtype: torch.dtype,
    workspace_mib: int,
    want_kl_grad: bool,
) -> Tensor:
    """dL/d hidden (N, H); at least one of c and e is given."""
    at = _Settings(temperature, "auto", 0.0, 0, 0.0, path, dtype, workspace_mib, True, want_kl_grad)
    weights = Head.unflatten(list(head), list(numbers))
    return _gradient(c, e, Entries(*entries), diffuse, g, g_kl, mean, weights, hidden_dtype, at)


@_sweep_backward_op.register_fake
def _(c, e, entries, diffuse, g, g_kl, mean, head, numbers, hidden_dtype, *settings):
    return torch.empty(entries[0].shape[0] - 1, mean.shape[0], dtype=hidden_dtype, device=mean.device)


def _setup_context(ctx, inputs, output):
    hidden, _, head, numbers, _, _, mean, *settings = inputs
    ctx.save_for_backward(*output[4:13], mean, *head)
    ctx.numbers, ctx.dtype, ctx.at = numbers, hidden.dtype, _Settings(*settings)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, c, _entropy, _ref, e, *_):
    saved, at = ctx.saved_tensors, ctx.at
    d_hidden = None
    if c is not None or e is not None:
        d_hidden = _sweep_backward_op(
            c, e, list(saved[:6]), *saved[6:10], list(saved[10:]), ctx.numbers, ctx.dtype, at.temperature, at.path,
            at.dtype, at.workspace_mib, at.want_kl_grad,
        )  # fmt: skip
    return d_hidden, None, [None] * len(saved[10:]), *[None] * (4 + len(at))


_sweep_op.register_autograd(_op_backward, setup_context=_setup_context)


def linear_logps(
    hidden: Tensor,  # (N, H), any float dtype, any strides
    head: Head | Tensor,  # or its weight (V, H)
    targets: Tensor,  # (N,) int64
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    entropy: bool = False,
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
        workspace_mib: memory for tiles, in MiB, whatever N, V and H.
        ref_hidden: hidden states of a reference under the same head, swept along; yields `ref_logps`.
        kl: with `ref_hidden`, also return the exact KL(policy || reference) over the whole vocabulary, in nats.
        wanted: rows that need a gradient; the others get none, whatever the loss says. All rows if left out.
        direction: `auto`, `sparse`, `dense`, or all of it as DirectionParams.
        path: `fused`, `cublas` or `torch`; the launch decision's if left out.

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, a temperature that is not positive, a
            reference with a head that is being trained, a path that the device cannot take.
    """
    head = Head(head) if isinstance(head, Tensor) else head
    if softcap is not None or logit_scale is not None:
        scale = head.logit_scale if logit_scale is None else logit_scale
        head = Head(head.weight, head.bias, scale, head.softcap if softcap is None else softcap)
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
    traced = torch.compiler.is_compiling() or type(hidden) not in (Tensor, torch.nn.Parameter)
    if (
        not traced and targets.device.type == "cpu" and targets.numel()
        and not (int(targets.min()) >= 0 and int(targets.max()) < vocab)
    ):  # fmt: skip
        raise ValueError(f"a target lies outside the vocabulary of {vocab}")
    params = DirectionParams(direction) if isinstance(direction, str) else direction
    trainable = head.trainable and torch.is_grad_enabled()
    want_grad = torch.is_grad_enabled() and hidden.requires_grad and not trainable
    at = _Settings(
        temperature, params.mode, params.epsilon, params.capacity, params.max_tail, path,
        compute_dtype(hidden, path), workspace_mib, want_grad, want_grad and kl,
    )  # fmt: skip
    if trainable:
        if ref_hidden is not None:
            raise ValueError("a reference cannot share the sweep of a head that is being trained")
        if not head.dense:
            raise ValueError("the bias of a quantized head cannot be trained; freeze it")
        transform = Transform(head.logit_scale, head.softcap, temperature)
        sweep_once = lambda weights: _forward(hidden.detach(), None, weights, targets, None, at)
        logps, ent = TrainableHead.apply(
            hidden, head.weight, head.bias, targets, sweep_once, transform, at.dtype, workspace_mib
        )
        return LinearLogps(logps, ent if entropy else None)
    ref_hidden = None if ref_hidden is None else ref_hidden.detach()
    lists = want_grad and params.mode != "dense"
    mean, radius = head.centre(hidden.device) if lists else (torch.zeros(width, device=hidden.device), None)
    # With soft-capping nothing is put on the mean row, for its share of the slopes is unknown.
    mean = mean if head.softcap is None else torch.zeros_like(mean)
    if traced:
        tensors, numbers = head.flatten()
        out = _sweep_op(hidden, ref_hidden, tensors, numbers, targets, wanted, mean, *at)
        logps, ent, ref_logps, full_kl, tail, spread, diffuse = *out[:4], out[8], out[13], out[10]
    else:
        logps, ent, ref_logps, full_kl, tail, spread, diffuse = _FrozenHead.apply(
            hidden, ref_hidden, head, targets, wanted, mean, at
        )
    has_ref = ref_hidden is not None
    # A sum of at most `capacity` float32 probabilities is itself not exact.
    within = lambda missing: (missing + 2.0**-20) * (radius * abs(head.logit_scale) / temperature) if lists else None
    return LinearLogps(
        logps,
        ent if entropy else None,
        ref_logps if has_ref else None,
        full_kl if kl else None,
        within(tail),
        within(spread) if kl else None,
        diffuse if want_grad else None,
    )


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
