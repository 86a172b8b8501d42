"""What a choice of tiles goes by: the card, and powers of two."""

from __future__ import annotations

from functools import lru_cache

import torch
from lowvram_grpo.kernels.runtime import interpreted

# Multiprocessors of a card that is not there (meta tensors): the most that an 8 GB GeForce has (RTX 3070), so that no
# such card makes more ranges than were counted.
ASSUMED_MULTIPROCESSORS = 46


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache
def card(device: torch.device) -> tuple[int, int]:
    """(compute capability, multiprocessors) of `device`; of meta tensors those of this machine's card or of any."""
    if interpreted() or not torch.cuda.is_available():
        return 86, ASSUMED_MULTIPROCESSORS
    at = device if device.type == "cuda" else None
    major, minor = torch.cuda.get_device_capability(at)
    return 10 * major + minor, torch.cuda.get_device_properties(at).multi_processor_count
