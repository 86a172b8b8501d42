"""What the ledger cannot see, in one place. Estimates until rows of benchmarks/results say otherwise.

`python benchmarks/report.py` compares predicted with measured peaks; these numbers follow from that comparison.

Looked at and left out: what attention's backward makes for itself (tokens x heads x head size in float32, while the MLP
of the same layer, at another time, holds more), and cuDNN's workspaces (its attention is not what a GeForce takes).
Triton's kernels take no scratch memory, and their code is part of the context. The copy of a 4-bit weight that
bitsandbytes makes inside an operator is counted by the ledger: `four_bit.hidden_copy`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowvram_grpo.memory.cards import Card

MIB = 2**20


@dataclass(frozen=True)
class Overheads:
    """Bytes beside the tensors.

    Attributes:
        context: CUDA context with its loaded modules (PyTorch's, cuBLAS's, bitsandbytes', Triton's kernels).
        cublas: workspace of one cuBLAS handle and stream: 4,096 KiB x 2 + 16 KiB x 8 by PyTorch's default
            CUBLAS_WORKSPACE_CONFIG, 32 MiB on Hopper and Blackwell's data centre cards (`on`).
        graph_workspaces: more of them once decode steps are captured. The stream of captures has its own, which lies in
            the graphs' pool, and PyTorch keeps it for as long as the process lives.
        graph_layer: what the driver keeps of a captured step, for a layer and a width: some 30 nodes of 8 KiB. It is no
            memory of PyTorch's. Drivers before 550 keep several times as much (vLLM #5517: 3.8 GiB against 1.1).
        block: the caching allocator rounds sizes up to this.
        fragmentation: share of what is not weights that lies in segments without being used.
        measured: whether a row of this repository stands behind the numbers.
    """

    context: int
    cublas: int
    block: int
    fragmentation: float
    measured: bool
    graph_workspaces: int = 0
    graph_layer: int = 0


# Context: 250 to 450 MiB are reported for torch 2.x with lazy module loading (CUDA_MODULE_LOADING=LAZY, the default).
CUDA = Overheads(
    context=400 * MIB, cublas=9 * MIB, block=512, fragmentation=0.08, measured=False, graph_workspaces=1,
    graph_layer=MIB // 4,
)  # fmt: skip
CPU = Overheads(context=0, cublas=0, block=1, fragmentation=0.0, measured=True)
# Compute capabilities whose cuBLAS gets 32 MiB (at::cuda's default).
_LARGE_WORKSPACE = (9, 10)


def on(device: str, card: Card | None = None) -> Overheads:
    """Of a kind of device (cuda or cpu), and of a card where it is known."""
    if device != "cuda":
        return CPU
    if card is not None and card.capability[0] in _LARGE_WORKSPACE:
        return replace(CUDA, cublas=33 * MIB)
    return CUDA
