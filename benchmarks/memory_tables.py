"""What the rows of part_memory.py say: predicted against measured, and the overheads that follow from it."""

from __future__ import annotations

from pathlib import Path

from lowvram_grpo.memory.overheads import CUDA

MIB = 2**20
# The `profile` of runs that shared the card with others: their times say nothing, nor do their contexts.
BESIDE = "beside others"
HEADER = ["model", "preset", "budget MiB", "predicted MiB", "measured MiB", "difference MiB", "difference", "in phase",
          "tensors at the peak beyond the ledger's, MiB"]  # fmt: skip


def as_ever(row: dict) -> bool:
    """Whether the run had the settings that people get, and not one that is compared with another."""
    return not any(f"{name}=" in (row.get("setup") or "") for name in ("attention", "fused_ops"))


def measured(rows: list[dict]) -> list[dict]:
    """Rows of ours that a GPU has seen through; a CPU's allocator has no peaks, and its rows no total."""
    return [r for r in rows if r.get("part") == "memory" and r.get("fits") and r.get("total_mib") is not None
            and r.get("predicted_peak_mib")]  # fmt: skip


def body(rows: list[dict]) -> list[list[str]]:
    """A line a measured row, as `HEADER`."""
    lines = []
    for r in measured(rows):
        said, seen = r["predicted_peak_mib"], r["total_mib"]
        lines.append([
            Path(r["model"]).name, r["preset"], f"{1024 * r['cap_gib']:.0f}", f"{said:.0f}", f"{seen:.0f}",
            f"{seen - said:+.0f}", f"{seen / said - 1:+.1%}", r["predicted_peak_phase"], f"{r['unseen_mib']:+.0f}",
        ])  # fmt: skip
    return lines


def calibration(rows: list[dict]) -> str:
    """What memory/overheads.py should hold after these rows; only measured ones count."""
    found = measured(rows)
    if not found:
        return "Calibration of memory/overheads.py: nothing measured."
    span = lambda values, form: f"{min(values):{form}} to {max(values):{form}}"
    context = [r["context_mib"] for r in found if r.get("context_known")]
    shares = [r["fragmentation"] for r in found if r.get("fragmentation") is not None]
    parts = []
    if context:
        parts.append(f"context {span(context, '.0f')} MiB (now {CUDA.context / MIB:.0f})")
    if shares:
        parts.append(f"fragmentation {span(shares, '.3f')} (now {CUDA.fragmentation:g})")
    parts.append(
        f"tensors beyond the ledger's, cuBLAS' workspace among them, {span([r['unseen_mib'] for r in found], '+.0f')} "
        f"MiB (now {CUDA.cublas / MIB:.0f})"
    )
    return f"Calibration of memory/overheads.py from {len(found)} runs on this card: {'; '.join(parts)}."
