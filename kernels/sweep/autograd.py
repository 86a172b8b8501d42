"""The sweep with a gradient to the hidden states, for a head that is frozen.

In eager mode it runs as a plain autograd.Function, so that a ledger or a FLOP counter sees every operator in it; under
torch.compile it is the opaque operator `lowvram_grpo::sweep`, which has a fake implementation and a backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.products import without_autocast
from lowvram_grpo.kernels.sweep.direction import Entries, RowGrads, sparse_direction
from lowvram_grpo.kernels.sweep.launch import launch_config
from lowvram_grpo.kernels.sweep.plan import DirectionParams
from lowvram_grpo.kernels.sweep.sweep import Swept, sweep
from torch import Tensor
from torch.autograd.function import once_differentiable


class SweepSettings(NamedTuple):
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
    entropy_gradient: bool

    @property
    def want_entropy_grad(self) -> bool:
        return self.want_grad and self.entropy_gradient

    @property
    def direction(self) -> DirectionParams:
        return DirectionParams(self.mode, self.epsilon, self.capacity, self.max_tail)


def run_sweep(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    head: Head,
    targets: Tensor,
    wanted: Tensor | None,
    settings: SweepSettings,
) -> Swept:
    """The sweep as `settings` have it, without autograd."""
    has_ref = ref_hidden is not None
    launch = launch_config(hidden.device, settings.dtype, hidden.shape[1], has_ref=has_ref, path=settings.path)
    with without_autocast(hidden), torch.no_grad(), torch.cuda.device_of(hidden):
        return sweep(
            hidden, ref_hidden, head, targets, wanted, temperature=settings.temperature, params=settings.direction,
            launch=launch, dtype=settings.dtype, workspace_mib=settings.workspace_mib, want_grad=settings.want_grad,
            want_kl_grad=settings.want_kl_grad, entropy_gradient=settings.entropy_gradient,
        )  # fmt: skip


def _backward(
    grads: RowGrads,
    entries: Entries,
    diffuse: Tensor,
    directions: Sequence[Tensor],
    mean: Tensor,
    head: Head,
    dtype: torch.dtype,
    settings: SweepSettings,
    ends: list[int] | None,
) -> Tensor:
    """dL/d hidden (N, H) of `dtype`; `directions` (Nd, H) of the rows that are `diffuse`, as `grads`. `ends` as in
    `sparse_direction`."""
    path = launch_config(grads.logps.device, settings.dtype, head.shape[1], path=settings.path).path
    factor = head.logit_scale / settings.temperature
    plain = lambda grad: None if grad is None else grad.float().contiguous()
    with torch.cuda.device_of(grads.logps):
        d_hidden = sparse_direction(
            head, entries, RowGrads(*map(plain, grads)), mean, factor, dtype,
            use_triton=path != "torch", workspace_mib=settings.workspace_mib, ends=ends,
        )  # fmt: skip
    step = max(1, 2**20 // head.shape[1])
    for k0 in range(0, len(diffuse), step):
        rows, part = diffuse[k0 : k0 + step], slice(k0, k0 + step)
        first, *others = ((grad, g[part]) for grad, g in zip(grads, directions) if grad is not None)
        d = first[0][rows, None] * first[1]
        for grad, g in others:
            d += grad[rows, None] * g
        d_hidden[rows] = d.to(dtype)
    return d_hidden


class FrozenHead(torch.autograd.Function):
    """(logps, entropy, ref_logps, kl, tail, spread, entropy_tail, diffuse); gradient to the hidden states only."""

    @staticmethod
    def forward(ctx, hidden, ref_hidden, head, targets, wanted, mean, settings):
        swept = run_sweep(hidden, ref_hidden, head, targets, wanted, settings)
        entries = swept.entries
        ctx.save_for_backward(*entries, swept.diffuse, swept.g, swept.g_kl, swept.g_entropy, mean)
        ctx.head, ctx.dtype, ctx.settings, ctx.ends = head, hidden.dtype, settings, swept.ends
        bounds = entries.tail, swept.kl_spread, entries.entropy_tail
        plain = () if settings.want_entropy_grad else (swept.entropy,)
        ctx.mark_non_differentiable(*plain, swept.ref_logps, *bounds, swept.diffuse)
        ctx.set_materialize_grads(False)
        return swept.logps, swept.entropy, swept.ref_logps, swept.kl, *bounds, swept.diffuse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy, _ref, grad_kl, *_):
        *entries, diffuse, g, g_kl, g_entropy, mean = ctx.saved_tensors
        d_hidden = _gradient(
            (grad_logps, grad_kl, grad_entropy), Entries(*entries), diffuse, (g, g_kl, g_entropy), mean, ctx.head,
            ctx.dtype, ctx.settings, ctx.ends,
        )  # fmt: skip
        return d_hidden, None, None, None, None, None, None


def _gradient(grads, entries, diffuse, directions, mean, head, dtype, settings, ends=None):
    """`_backward` for gradients of log-prob, KL and entropy of which any may be absent."""
    logps, kl, entropy = grads
    kl = kl if settings.want_kl_grad else None
    entropy = entropy if settings.want_entropy_grad else None
    present = next((grad for grad in (logps, kl, entropy) if grad is not None), None)
    if present is None:
        return None
    logps = torch.zeros_like(present) if logps is None else logps
    return _backward(RowGrads(logps, kl, entropy), entries, diffuse, directions, mean, head, dtype, settings, ends)


@torch.library.custom_op("lowvram_grpo::sweep", mutates_args=())
def sweep_op(
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
    entropy_gradient: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor,
]:  # fmt: skip
    """The sweep as an operator; outputs are the fields of `Swept`, its entries unpacked."""
    settings = SweepSettings(
        temperature, mode, epsilon, capacity, max_tail, path, dtype, workspace_mib, want_grad, want_kl_grad,
        entropy_gradient,
    )  # fmt: skip
    swept = run_sweep(hidden, ref_hidden, Head.unflatten(list(head), list(numbers)), targets, wanted, settings)
    return (*swept[:4], *swept.entries, *swept[5:10])


@sweep_op.register_fake
def _(hidden, ref_hidden, head, numbers, targets, wanted, mean, *settings):
    settings = SweepSettings(*settings)
    n, width = hidden.shape
    fake = lambda *shape, of=torch.float32: torch.empty(*shape, dtype=of, device=hidden.device)
    entries = diffuse = 0
    if settings.want_grad:
        context = torch.library.get_ctx()
        entries, diffuse = context.new_dynamic_size(), context.new_dynamic_size()
    ref, kl, entropy = n if ref_hidden is not None else 0, settings.want_kl_grad, settings.want_entropy_grad
    return (
        fake(n), fake(n), fake(ref), fake(ref), fake(n + 1, of=torch.long), fake(entries, of=torch.int32),
        fake(entries), fake(entries if kl else 0), fake(entries if entropy else 0), fake(n), fake(n if kl else 0),
        fake(n if entropy else 0), fake(diffuse, of=torch.long), fake(diffuse, width),
        fake(diffuse if kl else 0, width), fake(diffuse if entropy else 0, width), fake(n if kl else 0),
    )  # fmt: skip


@torch.library.custom_op("lowvram_grpo::sweep_backward", mutates_args=())
def _sweep_backward_op(
    grad_logps: Tensor | None,
    grad_kl: Tensor | None,
    grad_entropy: Tensor | None,
    entries: Sequence[Tensor],
    diffuse: Tensor,
    directions: Sequence[Tensor],
    mean: Tensor,
    head: Sequence[Tensor],
    numbers: Sequence[float],
    hidden_dtype: torch.dtype,
    temperature: float,
    path: str | None,
    dtype: torch.dtype,
    workspace_mib: int,
    want_kl_grad: bool,
    entropy_gradient: bool,
) -> Tensor:
    """dL/d hidden (N, H); at least one of the gradients is given, and wanted."""
    settings = SweepSettings(
        temperature, "auto", 0.0, 0, 0.0, path, dtype, workspace_mib, True, want_kl_grad, entropy_gradient
    )
    weights, grads = Head.unflatten(list(head), list(numbers)), (grad_logps, grad_kl, grad_entropy)
    return _gradient(grads, Entries(*entries), diffuse, directions, mean, weights, hidden_dtype, settings)


@_sweep_backward_op.register_fake
def _(grad_logps, grad_kl, grad_entropy, entries, diffuse, directions, mean, head, numbers, hidden_dtype, *settings):
    return torch.empty(entries[0].shape[0] - 1, mean.shape[0], dtype=hidden_dtype, device=mean.device)


def _setup_context(ctx, inputs, output):
    hidden, _, head, numbers, _, _, mean, *settings = inputs
    ctx.save_for_backward(*output[4:16], mean, *head)
    ctx.numbers, ctx.dtype, ctx.settings = numbers, hidden.dtype, SweepSettings(*settings)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, grad_logps, grad_entropy, _ref, grad_kl, *_):
    saved, settings = ctx.saved_tensors, ctx.settings
    entries, diffuse, directions, mean, head = saved[:8], saved[8], saved[9:12], saved[12], saved[13:]
    # All floating outputs of an operator look differentiable.
    grad_entropy = grad_entropy if settings.want_entropy_grad else None
    d_hidden = None
    if grad_logps is not None or grad_kl is not None or grad_entropy is not None:
        d_hidden = _sweep_backward_op(
            grad_logps, grad_kl, grad_entropy, list(entries), diffuse, list(directions), mean, list(head), ctx.numbers,
            ctx.dtype, settings.temperature, settings.path, settings.dtype, settings.workspace_mib,
            settings.want_kl_grad, settings.entropy_gradient,
        )  # fmt: skip
    return d_hidden, None, [None] * len(head), *[None] * (4 + len(settings))


sweep_op.register_autograd(_op_backward, setup_context=_setup_context)
