"""The keys of random streams: a function of (seed, prompt, completion). What is drawn by them is in
`kernels/decode/noise.py`."""

from __future__ import annotations

from lowvram_grpo.kernels.decode.noise import GOLDEN, MULTIPLIERS, signed

_MASK64 = 2**64 - 1


def _mix_int(x: int) -> int:
    """splitmix64's finalizer on a Python integer."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) & _MASK64
    x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) & _MASK64
    return x ^ (x >> 31)


def stream_key(seed: int, prompt: int, completion: int) -> int:
    """int64 key of the random stream of one completion."""
    return signed(_mix_int(_mix_int(_mix_int(seed + GOLDEN) + prompt) + completion))
