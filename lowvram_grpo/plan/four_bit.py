"""Which way a product with a 4-bit weight goes in bitsandbytes: through the packed weight, or by a copy in 16 bits.

From some rows on, it dequantizes the whole weight and multiplies by that: 4.5 bytes a weight are moved instead of 0.5,
and the copy is memory that an operator makes for itself, where the ledger does not see it.

The rule is not public (`_gemm_4bit_use_custom_cuda` in bitsandbytes 0.50; versions before `gemm_4bit` went through the
packed weight for a single row only), so it is asked in this one place, and nothing depends on its being there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lowvram_grpo.memory.cards import Card

# Bytes a weight: packed, with one 8-bit scale for 64 and their own; as a copy it is read, written and read again.
PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)
COPIED = PACKED + 2 + 2
# Launches that the copy costs beside the product: the scales' scales, their offset, the weight.
COPY_LAUNCHES = 3
# On no card and for no shape is the packed weight left for fewer rows.
ALWAYS = 4
_ROWS = (*range(1, 33), *range(40, 513, 8))


@lru_cache(maxsize=4096)
def packed(card: Card, half: str, rows: int, n: int, k: int) -> bool:
    """Whether `rows` rows times an (n, k) weight goes through the packed weight. `half`: the dtype, by name."""
    if not _has_kernel():
        return rows == 1
    if rows <= ALWAYS:
        return True
    if card.index is not None:
        try:
            import torch
            from bitsandbytes.backends.cuda import ops

            return bool(ops._gemm_4bit_use_custom_cuda(card.index, getattr(torch, half), rows, n, k))
        except Exception:  # another version, or no CUDA build
            pass
    # What its rule comes to on GeForce cards, for a card that is not there to be asked.
    if half == "bfloat16" and card.capability < (8, 0):
        return rows < 8
    if n // 64 >= 2 * card.multiprocessors:
        return rows <= 128
    return rows <= (32 if n * k >= 4 * 2**20 else 16)


@lru_cache(maxsize=1024)
def moved(card: Card, half: str, rows: int, n: int, k: int) -> float:
    """Bytes a weight whose reading takes as long as the product. Where the packed weight is left for the copy, the two
    take the same, and few rows take what the packed weight is; in between, a straight line."""
    if not packed(card, half, rows, n, k):
        return COPIED
    if rows <= ALWAYS:
        return PACKED
    last = max(m for m in (rows, *_ROWS) if m >= rows and packed(card, half, m, n, k))
    return PACKED + (COPIED - PACKED) * rows / last


def hidden_copy(card: Card | None, half: str) -> Callable[[Any, tuple], int]:
    """A function of (operator, its arguments): bytes that it makes for itself and lets go before it returns, which are
    the copy of a 4-bit weight and its scales. 0 for all other operators. Without a card, the rows that every card takes
    through the packed weight are the limit."""

    def size(func: Any, args: tuple) -> int:
        if func.name() != "bitsandbytes::gemm_4bit":
            return 0
        x, _, (n, k) = args[:3]
        rows = x.numel() // k
        as_it_is = rows <= ALWAYS if card is None else packed(card, half, rows, n, k)
        return 0 if as_it_is else n * k * x.element_size() + 4 * n * k // 64

    return size


@lru_cache(maxsize=1)
def _has_kernel() -> bool:
    import bitsandbytes  # noqa: F401  registers its operators
    import torch

    return hasattr(torch.ops.bitsandbytes, "gemm_4bit")
