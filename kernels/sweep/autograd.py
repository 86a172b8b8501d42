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
from lowvram_grpo.kernels.sweep.direction import Entries, sparse_direction
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
            want_kl_grad=settings.want_kl_grad,
        )  # fmt: skip


def _backward(
    grad_logps: Tensor,
    grad_kl: Tensor | None,
    entries: Entries,
    diffuse: Tensor,
    g: Tensor,
    g_kl: Tensor,
    mean: Tensor,
    head: Head,
    dtype: torch.dtype,
    settings: SweepSettings,
    ends: list[int] | None,
) -> Tensor:
    """dL/d hidden (N, H) of `dtype` from dL/d logp and dL/d KL, both (N,). `ends` as in `sparse_direction`."""
    path = launch_config(grad_logps.device, settings.dtype, head.shape[1], path=settings.path).path
    factor = head.logit_scale / settings.temperature
    plain = lambda grad: None if grad is None else grad.float().contiguous()
    with torch.cuda.device_of(grad_logps):
        d_hidden = sparse_direction(
            head, entries, plain(grad_logps), plain(grad_kl), mean, factor, dtype,
            use_triton=path != "torch", workspace_mib=settings.workspace_mib, ends=ends,
        )  # fmt: skip
    step = max(1, 2**20 // head.shape[1])
    for k0 in range(0, len(diffuse), step):
        rows, part = diffuse[k0 : k0 + step], slice(k0, k0 + step)
        d = grad_logps[rows, None] * g[part]
        if grad_kl is not None:
            d += grad_kl[rows, None] * g_kl[part]
        d_hidden[rows] = d.to(dtype)
    return d_hidden


class FrozenHead(torch.autograd.Function):
    """(logps, entropy, ref_logps, kl, tail, spread, diffuse); gradient to the hidden states only."""

    @staticmethod
    def forward(ctx, hidden, ref_hidden, head, targets, wanted, mean, settings):
        swept = run_sweep(hidden, ref_hidden, head, targets, wanted, settings)
        ctx.save_for_backward(*swept.entries, swept.diffuse, swept.g, swept.g_kl, mean)
        ctx.head, ctx.dtype, ctx.settings, ctx.ends = head, hidden.dtype, settings, swept.ends
        plain = swept.entropy, swept.ref_logps, swept.entries.tail, swept.kl_spread, swept.diffuse
        ctx.mark_non_differentiable(*plain)
        ctx.set_materialize_grads(False)
        return swept.logps, swept.entropy, swept.ref_logps, swept.kl, swept.entries.tail, swept.kl_spread, swept.diffuse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, _entropy, _ref, grad_kl, *_):
        *entries, diffuse, g, g_kl, mean = ctx.saved_tensors
        d_hidden = _gradient(
            grad_logps, grad_kl, Entries(*entries), diffuse, g, g_kl, mean, ctx.head, ctx.dtype, ctx.settings, ctx.ends
        )
        return d_hidden, None, None, None, None, None, None


def _gradient(grad_logps, grad_kl, entries, diffuse, g, g_kl, mean, head, dtype, settings, ends=None):
    """`_backward` for gradients that may be absent."""
    if grad_logps is None and grad_kl is None:
        return None
    grad_kl = grad_kl if settings.want_kl_grad else None
    grad_logps = torch.zeros_like(grad_kl) if grad_logps is None else grad_logps
    return _backward(grad_logps, grad_kl, entries, diffuse, g, g_kl, mean, head, dtype, settings, ends)


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
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """The sweep as an operator; outputs are the fields of `Swept`, its entries unpacked."""
    settings = SweepSettings(
        temperature, mode, epsilon, capacity, max_tail, path, dtype, workspace_mib, want_grad, want_kl_grad
    )
    swept = run_sweep(hidden, ref_hidden, Head.unflatten(list(head), list(numbers)), targets, wanted, settings)
    return (*swept[:4], *swept.entries, *swept[5:9])


@sweep_op.register_fake
def _(hidden, ref_hidden, head, numbers, targets, wanted, mean, *settings):
    settings = SweepSettings(*settings)
    n, width = hidden.shape
    fake = lambda *shape, of=torch.float32: torch.empty(*shape, dtype=of, device=hidden.device)
    entries = diffuse = 0
    if settings.want_grad:
        context = torch.library.get_ctx()
        entries, diffuse = context.new_dynamic_size(), context.new_dynamic_size()
    ref, kl = n if ref_hidden is not None else 0, settings.want_kl_grad
    return (
        fake(n), fake(n), fake(ref), fake(ref), fake(n + 1, of=torch.long), fake(entries, of=torch.int32),
        fake(entries), fake(entries if kl else 0), fake(n), fake(n if kl else 0), fake(diffuse, of=torch.long),
        fake(diffuse, width), fake(diffuse if kl else 0, width), fake(n if kl else 0),
    )  # fmt: skip


@torch.library.custom_op("lowvram_grpo::sweep_backward", mutates_args=())
def _sweep_backward_op(
    grad_logps: Tensor | None,
    grad_kl: Tensor | None,
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
    """dL/d hidden (N, H); at least one of the gradients is given."""
    settings = SweepSettings(temperature, "auto", 0.0, 0, 0.0, path, dtype, workspace_mib, True, want_kl_grad)
    weights = Head.unflatten(list(head), list(numbers))
    return _gradient(grad_logps, grad_kl, Entries(*entries), diffuse, g, g_kl, mean, weights, hidden_dtype, settings)


@_sweep_backward_op.register_fake
def _(grad_logps, grad_kl, entries, diffuse, g, g_kl, mean, head, numbers, hidden_dtype, *settings):
    return torch.empty(entries[0].shape[0] - 1, mean.shape[0], dtype=hidden_dtype, device=mean.device)


def _setup_context(ctx, inputs, output):
    hidden, _, head, numbers, _, _, mean, *settings = inputs
    ctx.save_for_backward(*output[4:13], mean, *head)
    ctx.numbers, ctx.dtype, ctx.settings = numbers, hidden.dtype, SweepSettings(*settings)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, grad_logps, _entropy, _ref, grad_kl, *_):
    saved, settings = ctx.saved_tensors, ctx.settings
    d_hidden = None
    if grad_logps is not None or grad_kl is not None:
        d_hidden = _sweep_backward_op(
            grad_logps, grad_kl, list(saved[:6]), *saved[6:10], list(saved[10:]), ctx.numbers, ctx.dtype,
            settings.temperature, settings.path, settings.dtype, settings.workspace_mib, settings.want_kl_grad,
        )  # fmt: skip
    return d_hidden, None, [None] * len(saved[10:]), *[None] * (4 + len(settings))


sweep_op.register_autograd(_op_backward, setup_context=_setup_context)
