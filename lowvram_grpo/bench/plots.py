"""Where each GiB goes, as stacked bars: a figure a preset, a panel a model, a bar a phase."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowvram_grpo.bench.memory import measured_mib
from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import PHASES
from lowvram_grpo.memory.ledger import CATEGORIES

# From the bottom up: what stays, then what comes and goes, then what is no tensor.
COLOURS = {
    "CUDA context": "#5b6470", "CUDA graphs": "#8c95a0", "base weights": "#16355c", "streamed weights": "#3d7c98",
    "head": "#2f6db3",
    "adapter": "#7fb2e5", "reference": "#4a6fa5", "optimizer": "#b7d4f0", "gradients": "#f2c14e", "KV cache": "#2a9d8f",
    "recurrent states": "#1d6f66", "workspace": "#8ab17d", "activations": "#e07a3f", "fragmentation": "#c9c9c9",
}  # fmt: skip
assert set(CATEGORIES) <= set(COLOURS)
_INK = "#222222"


def draw(rows: Iterable[dict[str, Any]], folder: Path, prefix: str = "memory") -> list[Path]:
    """`PREFIX-PRESET.png` for each preset among the rows; of a model measured twice, the later row.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('The plots need matplotlib: pip install "lowvram-grpo[plots]".') from error
    by_preset: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.get("predicted_mib"):
            by_preset.setdefault(row["preset"], {})[row["model"]] = row
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for preset, models in by_preset.items():
        figure = Figure(figsize=(8.6, 0.7 + 3.9 * len(models)), layout="constrained")
        axes = figure.subplots(len(models), 1, squeeze=False)[:, 0]
        for axis, row in zip(axes, models.values()):
            _panel(axis, row)
        _legend(figure, axes)
        drawn.append(folder / f"{prefix}-{preset}.png")
        figure.savefig(drawn[-1], dpi=120)
    return drawn


def _panel(axis: Any, row: dict[str, Any]) -> None:
    names = [name for name in PHASES if name in row["predicted_mib"]]
    budget = row["cap_gib"]
    top = budget
    for at, name in enumerate(names):
        foot = 0.0
        for category, colour in COLOURS.items():
            size = row["predicted_parts_mib"][name].get(category, 0) / 1024
            if size:
                axis.bar(at, size, 0.54, bottom=foot, color=colour, edgecolor="white", linewidth=0.4, label=category)
                foot += size
        axis.text(at, foot + 0.012 * budget, f"{foot:.2f}", ha="center", va="bottom", fontsize=9, color=_INK,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2}, zorder=3)  # fmt: skip
        top = max(top, foot)
        if (seen := measured_mib(row, name)) is not None:
            axis.plot(at + 0.33, seen / 1024, marker="<", color="#b3002d", linestyle="none", label="measured")
            axis.text(at + 0.29, seen / 1024 - 0.03 * budget, f"{seen / 1024:.2f}", fontsize=8, color="#b3002d",
                      va="top", ha="left")  # fmt: skip
            top = max(top, seen / 1024)
    axis.axhline(budget, color="#b3002d", linestyle="--", linewidth=1.2)
    axis.text(
        len(names) - 0.45, budget, f"budget {budget:.1f} GiB", color="#b3002d", fontsize=8.5, va="bottom", ha="right"
    )
    axis.set_ylim(0, 1.12 * top)
    axis.set_xlim(-0.55, len(names) - 0.4)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("GiB, predicted (ledger)")
    fits = "fits" if row["fits_predicted"] else "does not fit"
    rungs = ", ".join(row["rungs"]) or "none"
    axis.set_title(
        f"{Path(row['model']).name} on a card of {row['vram_gib']:g} GB, preset {row['preset']}: {fits}\n"
        f"savers beyond the preset: {rungs}", fontsize=10, loc="left",
    )  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def _legend(figure: Any, axes: Iterable[Any]) -> None:
    """One for all panels, in the order of the bars read from the top."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    order = [name for name in ("measured", *reversed(COLOURS)) if name in handles]
    labels = {"measured": "measured (with context)"}
    figure.legend(
        [handles[name] for name in order], [labels.get(name, name) for name in order], loc="outside right upper",
        frameon=False, fontsize=9,
    )  # fmt: skip
