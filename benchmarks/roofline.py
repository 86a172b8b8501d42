"""What the cards that this project is for could do at best: modelled, never measured.

    time = max(FLOP / peak, bytes / bandwidth)

with the FLOP and the bytes of device memory that each path cannot avoid, everything overlapping perfectly. A bound from
below: it says which of two paths can win on a card, and where arithmetic stops being what matters.
"""

from __future__ import annotations

from typing import NamedTuple

from lowvram_grpo.kernels.sweep.plan import DirectionParams, plan_tiles
from profiles import MAIN_SHAPES, SHAPES, Shape


class Card(NamedTuple):
    """Multiprocessors, boost clock in GHz, GB/s of memory, and whether Triton has its tensor cores."""

    multiprocessors: int
    ghz: float
    gbs: float
    triton: bool
    source: str


# Multiprocessors, boost clock and bandwidth as NVIDIA publishes them for each card.
CARDS = {
    "RTX 4060": Card(24, 2.460, 272, True, "nvidia.com, GeForce RTX 4060 specifications; Ada architecture whitepaper"),
    "RTX 3060": Card(28, 1.777, 360, True, "nvidia.com, GeForce RTX 3060 specifications; GA102 whitepaper"),
    "RTX 2060 SUPER": Card(34, 1.650, 448, False, "nvidia.com, GeForce RTX 2060 SUPER; Turing whitepaper"),
}
# FLOP a clock of one multiprocessor's tensor cores, 16-bit operands and float32 accumulation, dense. The same on all
# three: the whitepapers' 53.8 TFLOP/s (2080 Ti: 68 at 1.545 GHz), 71 (3090: 82 at 1.695), 165.2 (4090: 128 at 2.52).
FLOP_PER_CLOCK = 512
# Bytes of device memory for each logit beyond the product's operands. cublas: written and read once in float32. torch:
# the passes of fold.fold_torch, 4 written by the product and 50 by its elementwise operators and reductions. eager:
# 16-bit logits, their float32 copy, log_softmax, and the three steps back.
BYTES_PER_LOGIT = {"fused": 0, "cublas": 8, "torch": 54, "eager": 36}
FLOP_PER_LOGIT = {"fused": 2, "cublas": 2, "torch": 2, "eager": 4}


class Modelled(NamedTuple):
    ms: float
    bound: str


def model(card: Card, shape: Shape, rows: int, path: str, workspace_mib: int = 64) -> Modelled:
    """Log-prob and gradient of `rows` listed (not diffuse) rows."""
    vocab, width = shape
    block = rows
    if path != "eager":
        listed = 12 * DirectionParams().capacity
        block = plan_tiles(rows, vocab, width, workspace_mib, item=2, view=True, row_bytes=width * 2 + listed).rows
    # Each block of rows reads the head once; the eager backward reads it a second time.
    reads = 2 if path == "eager" else -(-rows // block)
    flop = FLOP_PER_LOGIT[path] * rows * vocab * width
    moved = reads * vocab * width * 2 + BYTES_PER_LOGIT[path] * rows * vocab
    arithmetic = flop / (FLOP_PER_CLOCK * card.multiprocessors * card.ghz * 1e9)
    memory = moved / (card.gbs * 1e9)
    return Modelled(max(arithmetic, memory) * 1e3, "arithmetic" if arithmetic >= memory else "memory")


def table(rows: int = 2048) -> list[str]:
    """Markdown."""
    paths = list(BYTES_PER_LOGIT)
    lines = [
        "## Modelled, not measured",
        "",
        f"Log-prob and gradient of {rows} rows of a trained model, in ms: `max(FLOP / peak, bytes / bandwidth)` from "
        "published specifications (`benchmarks/roofline.py` has the constants and their sources). A bound from below; "
        "(m) where memory, not arithmetic, sets it. Nobody here has run these cards.",
        "",
        "| card | head | " + " | ".join(paths) + " |",
        "|---|---|" + "---|" * len(paths),
    ]
    for name, card in CARDS.items():
        for shape_name in MAIN_SHAPES:
            shape = SHAPES[shape_name]
            cells = []
            for path in paths:
                found = model(card, shape, rows, path)
                said = f"{found.ms:.1f}{' (m)' if found.bound == 'memory' else ''}"
                cells.append("-" if path == "fused" and not card.triton else said)
            lines.append(f"| {name} | {shape_name} | " + " | ".join(cells) + " |")
    return lines
