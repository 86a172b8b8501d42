"""The gate before the clock: every provider against float64 on some rows of the very call that is then timed.

A provider of ours may be no worse than twice eager code in the same dtype, both measured against float64. A rival's
error is only recorded, unless it is so large that the rival computes something else; then it gets no time either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from lowvram_grpo.kernels.head import Head
from torch import Tensor

ROWS = 64
# Relative error of the gradient, or nats of a log-prob, beyond which a rival computes another function.
ANOTHER_FUNCTION = 0.25


class Exact(NamedTuple):
    """float64: logps (R,), kl (R,) or None, d_hidden (R, H) of sum(c * logps + e * kl)."""

    logps: Tensor
    kl: Tensor | None
    d_hidden: Tensor


def subset(n: int) -> list[int]:
    """At most ROWS rows, evenly spaced over all blocks."""
    return sorted({i * (n - 1) // max(1, min(n, ROWS) - 1) for i in range(min(n, ROWS))})


def _tiles(head: Head, device: torch.device, step: int = 4096) -> Iterator[tuple[int, Tensor]]:
    """float64 tiles of the weight; a quantized one is read in float32, for that is what its codes mean."""
    v, h = head.shape
    buffer = torch.empty(min(step, v), h, device=device)
    for v0 in range(0, v, step):
        yield v0, head.tile(v0, min(v0 + step, v), buffer)[0].double()


def _logits(hidden: Tensor, head: Head) -> Tensor:
    out = torch.empty(len(hidden), head.shape[0], dtype=torch.float64, device=hidden.device)
    for v0, w in _tiles(head, hidden.device):
        out[:, v0 : v0 + len(w)] = hidden @ w.T
    return out


@torch.no_grad()
def oracle(
    hidden: Tensor,  # (R, H)
    head: Head,  # without bias, scale and soft-capping
    targets: Tensor,  # (R,)
    c: Tensor,  # (R,)
    ref_hidden: Tensor | None = None,  # (R, H)
    e: Tensor | None = None,  # (R,)
) -> Exact:
    """By the formulas of linear_logps.py with full logits of these rows."""
    logp = torch.log_softmax(_logits(hidden.double(), head), -1)
    p = logp.exp()
    pull, kl = -p * c.double()[:, None], None
    if ref_hidden is not None:
        gap = logp - torch.log_softmax(_logits(ref_hidden.double(), head), -1)
        kl = (p * gap).sum(1)
        pull += p * (gap - kl[:, None]) * e.double()[:, None]
    pull.scatter_add_(1, targets[:, None], c.double()[:, None])
    d = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for v0, w in _tiles(head, hidden.device):
        d.addmm_(pull[:, v0 : v0 + len(w)], w)
    return Exact(logp.gather(1, targets[:, None])[:, 0], kl, d)


def errors(exact: Exact, logps: Tensor | None, kl: Tensor | None, d_hidden: Tensor | None) -> dict[str, float]:
    """Largest absolute error of log-probs and KL in nats, relative (Frobenius) error of the gradient."""
    found = {}
    if logps is not None:
        found["error_logps"] = float((logps.double() - exact.logps).abs().max())
    if kl is not None:
        found["error_kl"] = float((kl.double() - exact.kl).abs().max())
    if d_hidden is not None:
        found["error_grad"] = float((d_hidden.double() - exact.d_hidden).norm() / exact.d_hidden.norm())
    return found


def verdict(found: dict[str, float], eager: dict[str, float], exact: Exact, ours: bool, slack: float) -> str | None:
    """Why the provider fails its gate, in a few words; None where it passes.

    Args:
        slack: added to the bound of the gradient; Triton's interpreter rounds to 16 bits towards zero.
    """
    for name, error in found.items():
        if not ours:
            bound = ANOTHER_FUNCTION
        else:
            size = {"error_logps": exact.logps, "error_kl": exact.kl}.get(name)
            atol = 1e-5 + slack if size is None else 4e-6 * (1 + float(size.abs().max()))
            bound = 2 * eager[name] + atol
        if not error <= bound:  # NaN fails too
            return f"{name} {error:.2e} is above {bound:.2e}"
    return None
