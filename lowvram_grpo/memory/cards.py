"""What a card can do at best: multiprocessors, clock, bandwidth. For estimates of speed; nothing breaks without it.

The card that is there says so itself; for one that is planned for on paper there is a typical one of its size.
"""

from __future__ import annotations

from typing import NamedTuple

from lowvram_grpo.memory import nvml


class Card(NamedTuple):
    """Multiprocessors, boost clock in GHz, GB/s of its memory, compute capability, the CUDA device that it is (None
    where it is not there), and the PCI Express generation and lanes between it and the host."""

    name: str
    multiprocessors: int
    ghz: float
    gbs: float
    capability: tuple[int, int]
    index: int | None = None
    pcie: tuple[int, int] = (4, 8)

    @property
    def bus(self) -> float:
        """Bytes a second from page-locked memory."""
        generation, lanes = self.pcie
        return _LANE.get(generation, _LANE[max(_LANE)]) * lanes * 1e9 * _REACHED

    @property
    def bus_name(self) -> str:
        """`PCIe 4.0 x8`, and whether that is known or taken to be so."""
        return f"PCIe {self.pcie[0]}.0 x{self.pcie[1]}" + (", assumed" if self.index is None else "")

    @property
    def flops(self) -> float:
        """FLOP/s of its tensor cores: 16-bit operands, float32 accumulation, dense."""
        return self.multiprocessors * self.ghz * 1e9 * _FLOP_PER_CLOCK.get(self.capability, _GEFORCE)


# FLOP a clock and multiprocessor. GeForce: 53.8 TFLOP/s of a 2080 Ti (68 at 1.545 GHz), 71 of a 3090 (82 at 1.695),
# 165.2 of a 4090 (128 at 2.52), 209.5 of a 5090 (170 at 2.407); A100 312 (108 at 1.41), H100 989 (132 at 1.83), B200
# 2,250 (148 at 1.85), all by NVIDIA's whitepapers.
_GEFORCE = 512
_FLOP_PER_CLOCK = {(7, 0): 1024, (8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}

# GB/s of a lane, and what of it copies reach: 12 GB/s are seen over PCIe 3.0 x16 and 4.0 x8.
_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
_REACHED = 12 / (1.969 * 8)

# What is sold most of each size, with the numbers that NVIDIA publishes; those of 4 and 6 GB are laptops', whose boards
# wire eight lanes. A 3060 and a 3090 have sixteen, which in boards of their time are of the third generation.
_TYPICAL = {
    4: Card("RTX 3050 Laptop", 16, 1.740, 192, (8, 6)),
    6: Card("RTX 3060 Laptop", 30, 1.703, 336, (8, 6)),
    8: Card("RTX 4060", 24, 2.460, 272, (8, 9)),
    12: Card("RTX 3060", 28, 1.777, 360, (8, 6), pcie=(3, 16)),
    16: Card("RTX 4060 Ti", 34, 2.535, 288, (8, 9)),
    24: Card("RTX 3090", 82, 1.695, 936, (8, 6), pcie=(3, 16)),
}


def typical(gib: float) -> Card:
    """A card that is sold with `gib` of memory: the largest known one that has no more, else the smallest."""
    return _TYPICAL[max((size for size in _TYPICAL if size <= gib * 1.05), default=min(_TYPICAL))]


def present(index: int, gib: float, uuid: str = "") -> Card:
    """The CUDA device `index`, by its own properties; what it does not say is taken from a typical card of its size.
    The driver is asked for the bus, which knows the card by its `uuid`."""
    likely = typical(gib)
    try:
        import torch

        if not torch.cuda.is_available():
            return likely
        found = torch.cuda.get_device_properties(index)
        clock, memory, bus = (
            getattr(found, name, 0) for name in ("clock_rate", "memory_clock_rate", "memory_bus_width")
        )
        # Clocks are in kHz, the bus in bits; memory moves two words a clock.
        return Card(
            found.name,
            found.multi_processor_count,
            clock / 1e6 or likely.ghz,
            2 * memory * 1e3 * bus / 8 / 1e9 or likely.gbs,
            (found.major, found.minor),
            index,
            next((card.pcie for card in nvml.cards() if card.uuid == uuid and card.pcie), likely.pcie),
        )
    except Exception:  # an estimate of speed is no reason for a run not to begin
        return likely
