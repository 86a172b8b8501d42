"""From a raw product x to a logit, in PyTorch and in Triton: softcap * tanh(scale * x / softcap) / temperature."""

from __future__ import annotations

from typing import NamedTuple

from lowvram_grpo.kernels.runtime import jit, tl
from torch import Tensor

# Where an online maximum starts without a hint: finite, so that 0 * (m - m_new) stays 0.
LOWEST = -1e30


class Transform(NamedTuple):
    """From a raw product to a logit."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """In place on float32 `x`."""
        if self.scale != 1.0:
            x *= self.scale
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            x /= self.temperature
        return x

    def slope(self, logit: Tensor) -> Tensor | None:
        """d logit / d(scale * x) * T of the transformed `logit`; None where it is 1 everywhere."""
        if self.softcap is None:
            return None
        return 1 - (logit * (self.temperature / self.softcap)).square()


@jit
def transform_logit(x, scale, softcap, inv_temperature):
    """As `Transform`; `softcap` None: none."""
    x = x * scale
    if softcap is not None:
        u = tl.exp(-2.0 * tl.abs(x) / softcap)
        t = (1.0 - u) / (1.0 + u)
        x = tl.where(x < 0, -t, t) * softcap
    return x * inv_temperature
