"""Which path a sweep takes on which device, and with what tiles: one plain function, no autotuner.

Three paths give the same numbers: `fused` multiplies and folds in one Triton kernel; `cublas` multiplies a tile into
the workspace and folds it with a second, Triton, launch; `torch` folds with PyTorch operators. The fused path saves
writing and reading 4 bytes a logit against 2H FLOP to make it: much at H = 896, little at H = 4096, where cuBLAS'
better schedule counts for more. `benchmarks/gpu_suite.py` measures both. On an H200 the host's launches bound both,
and two of the fused path's replace a hundred (25 against 32 ms at H = 896, 40 against 47 at 4096); on cards of 8 GB the
border below is an estimate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

PATHS = ("fused", "cublas", "torch")
# Widest hidden state for which the fused path is chosen: an estimate, see above.
FUSED_MAX_WIDTH = 2048


class FusedConfig(NamedTuple):
    """Tiles of the fused kernel. `programs`: how many the device runs at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int = 1


class LaunchConfig(NamedTuple):
    """The launch decision, and the reason in a few words, for people."""

    path: str
    reason: str
    fused: FusedConfig | None = None


def whole_waves(row_blocks: int, tiles: int, programs: int) -> int:
    """Into how many ranges to split V, so that the last wave of `row_blocks` times as many programs is about full."""

    def idle(splits: int) -> float:
        waves = -(-row_blocks * splits // programs)
        return 1 - row_blocks * splits / (waves * programs)

    return min(range(1, min(tiles, max(16, -(-programs // row_blocks))) + 1), key=lambda s: (round(idle(s), 2), s))


def fused_config(cc: int, has_ref: bool) -> FusedConfig | None:
    """Tiles for compute capability `cc`; None where the fused kernel is no choice.

    The largest tiles that leave no register spilled under Triton 3.6 and 3.9 (tests/kernels/gate.py; 128 x 128 spills
    40 to 80 bytes under 3.6), in half the 101,376 bytes of shared memory that consumer cards (86, 89, 120) have. Turing
    has no tensor cores in Triton.
    """
    if cc < 80:
        return None
    return FusedConfig(32, 128, 64, 8, 3) if has_ref else FusedConfig(64, 128, 64, 8, 3)


def launch_config(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    *,
    has_ref: bool = False,
    path: str | None = None,
) -> LaunchConfig:
    """Decide how hidden states of `width` and `dtype` are swept on `device`.

    Args:
        path: force one of PATHS; on a CPU the Triton paths need TRITON_INTERPRET=1.

    Raises:
        ValueError: unknown path, or one that this device cannot take.
    """
    if path is not None and path not in PATHS:
        raise ValueError(f"unknown path {path!r}; it is one of {', '.join(PATHS)}")
    if device.type == "meta":
        return LaunchConfig(path or "cublas", "counting bytes")
    if path not in (None, "torch") and not HAS_TRITON:
        raise ValueError(f"path {path!r} needs Triton; install triton (on Windows: triton-windows)")
    if device.type != "cuda":
        if path in (None, "torch"):
            return LaunchConfig("torch", f"{device.type} has no Triton")
        if not interpreted():
            raise ValueError(f"path {path!r} needs a GPU; on a CPU it only runs in Triton's interpreter")
        return LaunchConfig(path, "interpreted", FusedConfig(16, 256, 32, 4, 1, programs=3))
    major, minor = torch.cuda.get_device_capability(device)
    config = fused_config(10 * major + minor, has_ref)
    if path == "fused" and (config is None or dtype == torch.float32):
        raise ValueError(
            f"path 'fused' needs compute capability 8.0 and 16-bit hidden states, not {major}.{minor} and {dtype}"
        )
    if path is None:
        if not HAS_TRITON:
            path, reason = "torch", "Triton is not installed"
        elif config is None:
            path, reason = "cublas", f"compute capability {major}.{minor} has no tensor cores in Triton"
        elif dtype == torch.float32:
            path, reason = "cublas", "float32 products are cuBLAS' affair"
        elif width > FUSED_MAX_WIDTH:
            path, reason = "cublas", f"a hidden size of {width} favours cuBLAS"
        else:
            path, reason = "fused", f"a hidden size of {width} favours logits that never leave the chip"
    else:
        reason = "asked for"
    # The fused kernel's registers let one program onto a multiprocessor at a time.
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    return LaunchConfig(path, reason, config._replace(programs=programs) if path == "fused" else None)
