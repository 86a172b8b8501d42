"""Random numbers that are a function of (seed, prompt, completion, token): splitmix64 counters, on any device.

What a completion draws depends neither on who is sampled beside it nor on the device. Source: Steele, Lea, Flood 2014.
The streams' keys are made by `rollout.noise`; `sample.py` has the same as a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128  # ids that are drawn from together
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


def signed(x: int) -> int:
    """The int64 with the bits of x modulo 2^64."""
    x &= _MASK64
    return x - 2**64 if x >= 2**63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64; products wrap."""
    x = (x ^ _shift(x, 30)) * signed(MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * signed(MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def gumbel(keys: Tensor, steps: Tensor, stream: int, n: int) -> Tensor:
    """float64 (B, n) Gumbel noise from int64 (B,) keys, the tokens' positions (B,) and the number of the stream."""
    start = _mix(keys + (2 * steps + stream + 1) * signed(GOLDEN))
    index = torch.arange(1, n + 1, device=keys.device)
    bits = _shift(_mix(start[:, None] + index * signed(GOLDEN)), 11)
    return -(-((bits.double() + 0.5) * 2.0**-53).log()).log()


def draw(logits: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """(B,) ids drawn from softmax(logits), float32 (B, V), by Gumbel-max in two stages; keys and steps int64 (B,).

    A block of 128 ids is drawn by its mass, then an id in it: V / 128 + 128 random numbers a row where plain Gumbel-max
    would take V, and no running sum over V whose rounding would favour the early ids.
    """
    logits = F.pad(logits, (0, -logits.shape[1] % BLOCK), value=-torch.inf).unflatten(1, (-1, BLOCK))
    block = draw_block(logits.logsumexp(2), keys, steps)
    inside = logits.gather(1, block[:, None, None].expand(-1, 1, BLOCK))[:, 0]
    return draw_inside(inside, block, keys, steps)


def draw_block(mass: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """The first stage: int64 (B,) blocks drawn by their log-masses, float32 (B, blocks)."""
    return (mass + gumbel(keys, steps, 0, mass.shape[1])).argmax(1)


def draw_inside(inside: Tensor, block: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """The second: (B,) ids, drawn from the logits of the block, float32 (B, 128)."""
    return block * BLOCK + (inside + gumbel(keys, steps, 1, BLOCK)).argmax(1)
