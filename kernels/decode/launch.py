"""Which path `decode_attention` takes on which device, with what tiles, and into how many ranges keys are cut.

Plain functions of shapes and of the card, as in `sweep/launch.py`: the sizes of one step never enter, so that a CUDA
graph of it holds for all. The numbers are estimates until `benchmarks/bench_decode_attention.py` has run on a card.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from lowvram_grpo.kernels.card import power_of_2
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

PATHS = ("triton", "torch")
# Head: the accumulators of a wider one would spill, and float32 keys of 512 are more than Turing's shared memory.
WIDEST, WIDEST_FLOAT32 = 512, 256
MOST_QUERIES = 16  # heads a KV head: the smallest tile of a tensor core


class Tiles(NamedTuple):
    """Queries of a prompt and keys that a program holds at a time."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def least(self) -> int:
        """Tiles of keys that are worth a range of their own. A range costs each query an output of 4D bytes to write
        and to read, as much as a key and a value in 16 bits for two queries: hence four times as many keys as queries,
        and 128."""
        return max(128, 4 * self.queries) // self.keys

    def constants(self) -> dict[str, int]:
        """As a kernel's launch takes them."""
        return {
            "QUERIES": self.queries, "KEYS": self.keys, "LEAST": self.least, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


class Splits(NamedTuple):
    """Into how many ranges a prefix and a row's own tokens are cut; 0 of a prefix that can only be empty."""

    prefix: int
    own: int


def decode_path(
    device: torch.device,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    path: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> str:
    """One of PATHS for heads of `width` whose values are `value_width` wide, and queries of `dtype`.

    On meta tensors it is that of this machine's GPU, or of any: who counts the bytes of a CPU says "torch".

    Args:
        path: force one of PATHS; on a CPU "triton" needs TRITON_INTERPRET=1.

    Raises:
        ValueError: unknown path, or one that this device or these heads cannot take.
    """
    if path is not None and path not in PATHS:
        raise ValueError(f"unknown path {path!r}; it is one of {', '.join(PATHS)}")
    widest = WIDEST_FLOAT32 if dtype == torch.float32 else WIDEST
    covered = width == value_width <= widest and heads <= MOST_QUERIES * kv_heads
    if path != "triton":
        can = covered and HAS_TRITON and device.type in ("cuda", "meta")
        return "triton" if path is None and can else "torch"
    if not covered:
        raise ValueError(
            f"path 'triton' needs keys and values of one width up to {widest} and at most {MOST_QUERIES} heads a KV "
            f"head, not widths of {width} and {value_width} and {heads // kv_heads} heads"
        )
    if not HAS_TRITON:
        raise ValueError("path 'triton' needs Triton; install triton (on Windows: triton-windows)")
    if device.type not in ("cuda", "meta") and not interpreted():
        raise ValueError("path 'triton' needs a GPU; on a CPU it only runs in Triton's interpreter")
    return path


def tiles_of(cc: int, dtype: torch.dtype, width: int, queries: int) -> Tiles:
    """Tiles for compute capability `cc`, queries of `dtype`, heads of `width`, `queries` a prompt and KV head.

    None of them spills a register under Triton 3.8 and 3.9 (tests/kernels/gate.py; of heads wider than 128, 3.6 spills
    16 bytes for sm_90 and 3.7 24 for sm_86 and sm_89; of those wider than 256, which 3.7 and 3.8 have not compiled, 3.6
    spills 8 for sm_86 and sm_89), and but for those heads two programs fit into the 100 KB of
    shared memory of a consumer card. Turing and float32 have no tensor cores in Triton: there products take their
    operands out of registers.
    """
    wide = power_of_2(width)
    if wide > 256:
        # Four warps spill. On Turing it takes all of 64 KB of shared memory, elsewhere two programs fit into 100.
        return Tiles(16, 16, 8, 2)
    if cc < 80 or dtype == torch.float32:
        if wide > 128:
            # ptxas of Triton 3.8 spills 16 bytes of 32 keys for sm_80, and that of 3.9 8 bytes of 16 keys for sm_120.
            return Tiles(16, 16 if cc == 80 else 32, 8, 1)
        return Tiles(16, 32, 4, 1) if wide == 128 else Tiles(16, 16, 2, 1)
    if wide > 128:
        return Tiles(32, 32, 8, 3) if queries > 16 else Tiles(16, 32, 4, 3)
    if queries > 32:
        return Tiles(64, 32, 8, 2)
    keys = 64 if wide <= 64 else 32
    # ptxas spills 8 bytes of three stages for Hopper, and of two for the others.
    return Tiles(32, keys, 4, 2) if queries > 16 else Tiles(16, keys, 4, 2 if cc == 90 else 3)


def ranges(programs: int, length: int, tiles: Tiles, multiprocessors: int) -> int:
    """Into how many ranges to cut `length` keys, so that `programs` times as many programs put four onto each
    multiprocessor (with fewer, nothing hides how long memory takes to answer), none of them with fewer keys than
    `tiles` say is worth it; 0 of no keys."""
    return min(-(-4 * multiprocessors // max(1, programs)), -(-length // (tiles.keys * tiles.least)))
