"""Random inputs of the gated delta rule, and the comparison of a way to compute it with the definition in float64."""

from __future__ import annotations

import torch
from lowvram_grpo.kernels.recurrent.delta_chunks import Inputs, delta_rule_tokens
from lowvram_grpo.kernels.runtime import interpreted
from torch.nn import functional as F

DEVICE = torch.device("cpu" if interpreted() else "cuda")
NAMES = ("out", "state", "q", "k", "v", "g", "beta", "initial")


def problem(batch, length, key_heads, heads, width, v_width, dtype=torch.float32, seed=0, repeat=False, decay=2.0):
    """(q, k, v, g, beta, initial state), and gradients to the output and the last state.

    Args:
        repeat: all keys of a head are the same, written with beta near 1: what an inverse by powers cannot do.
        decay: how far below 0 g is, roughly exp(-decay).
    """
    make = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)
    q, k, v = randn(batch, length, key_heads, width), randn(batch, length, key_heads, width), None
    v = randn(batch, length, heads, v_width)
    g, beta = -F.softplus(randn(batch, length, heads) - decay), randn(batch, length, heads).sigmoid()
    if repeat:
        k, beta = k[:, :1].expand(k.shape).clone(), (beta + 9) / 10
    given = [x.to(DEVICE, dtype) for x in (q, k, v)] + [g.to(DEVICE, torch.promote_types(dtype, torch.float32))]
    given += [beta.to(DEVICE, dtype), randn(batch, heads, width, v_width).to(given[3])]
    return given, (randn(batch, length, heads, v_width).to(DEVICE, dtype), randn(*given[5].shape).to(given[3]))


def tokens(*given, normalize=True):
    """The definition."""
    return delta_rule_tokens(Inputs(*given[:5]), given[5], normalize)


def results(function, given, gradients):
    """Outputs, and gradients to all that was given."""
    given = [x.detach().requires_grad_() for x in given]
    outs = function(*given)
    back = torch.autograd.grad(outs, given, [d.to(out.dtype) for d, out in zip(gradients, outs)])
    return [x.detach() for x in (*outs, *back)]


def check(ours, eager, given, gradients, exact=tokens, times=2.0, slack=2e-6):
    """No worse than `times` what eager code in the same dtype gets wrong, at most and on average; `slack` of the
    largest entry is for float32's sums in another order."""
    found, plain = (results(f, given, gradients) for f in (ours, eager))
    truths = results(exact, [x.double() for x in given], [x.double() for x in gradients])
    if interpreted() and given[0].dtype == torch.bfloat16:
        slack = 2.0**-7  # the interpreter truncates
    for name, mine, theirs, truth in zip(NAMES, found, plain, truths):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, name
        error, allowed, size = (mine.double() - truth).abs(), (theirs.double() - truth).abs(), truth.abs().max()
        assert error.max() <= times * allowed.max() + slack * size, (name, error.max(), allowed.max(), size)
        assert error.mean() <= times * allowed.mean() + slack * truth.abs().mean(), name
