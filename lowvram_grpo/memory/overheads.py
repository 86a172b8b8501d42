"""What the ledger cannot see, in one place. Estimates until rows of benchmarks/results say otherwise.

`python benchmarks/report.py` compares predicted with measured peaks; these numbers follow from that comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Overheads:
    """Bytes beside the tensors.

    Attributes:
        context: CUDA context with its loaded modules (PyTorch's, cuBLAS's, bitsandbytes', Triton's kernels).
        cublas: workspace of one cuBLAS handle and stream: 4,096 KiB x 2 + 16 KiB x 8 by PyTorch's default
            CUBLAS_WORKSPACE_CONFIG, 32 MiB on Hopper.
        block: the caching allocator rounds sizes up to this.
        fragmentation: share of what is not weights that lies in segments without being used.
        measured: whether a row of this repository stands behind the numbers.
    """

    context: int
    cublas: int
    block: int
    fragmentation: float
    measured: bool


# Context: 250 to 450 MiB are reported for torch 2.x with lazy module loading (CUDA_MODULE_LOADING=LAZY, the default).
CUDA = Overheads(context=400 * MIB, cublas=9 * MIB, block=512, fragmentation=0.08, measured=False)
CPU = Overheads(context=0, cublas=0, block=1, fragmentation=0.0, measured=True)
