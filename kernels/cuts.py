"""Cutting rows into blocks."""

from __future__ import annotations

import torch


def cuts(rows: int, step: int, device: torch.device) -> list[tuple[int, int]]:
    """(first, last + 1) of blocks of at most `step` rows.

    On meta tensors only the first two: they stand for all where nothing but bytes counts (the second finds the buffers
    that the first has made), and planning the memory of a 150,000-row head would else take seconds.
    """
    starts = range(0, rows, step)
    return [(r0, min(r0 + step, rows)) for r0 in (starts[:2] if device.type == "meta" else starts)]
