"""The curves of a run as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.run.best import best_row, is_evaluation
from lowvram_grpo.run.directory import RunDirectory

COLD_START_STEP = "cold_start/step"
COLD_START_METRICS = {"reward": "cold_start/reward", "frac_reward_zero_std": "cold_start/dead_groups"}
INK, FAINT, COLD, EVALUATED = "#1f4e79", "#a9c4de", "#d9822b", "#2a7f3b"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values (fewer at the start): nothing is taken from the future."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def series(rows: list[dict[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a metric. The cold start's form of it, if there is one, comes first, at steps up to 0."""
    cold = COLD_START_METRICS.get(metric)
    end = max((row.get(COLD_START_STEP, 0) for row in rows), default=0)
    points = [(row[COLD_START_STEP] - end, row[cold]) for row in rows if cold and row.get(cold) is not None]
    points += [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot(run_dir: Path, out: Path | None = None) -> Path:
    """Draw reward, reward functions, KL and entropy, lengths, truncated and dead shares, and the gradient norm.

    Args:
        out: the PNG to write; report.png in the run directory if None.

    Raises:
        UserError: not a run, nothing logged yet, `out` can't be written, or matplotlib is missing.
    """
    run = RunDirectory.open(run_dir)
    rows = run.metrics()
    if not any("reward" in row for row in rows):
        raise UserError(f"{run.metrics_path} has no rewards yet; wait for the first logged step.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('The report needs matplotlib: pip install "lowvram-grpo[plots]".') from error

    figure = Figure(figsize=(12, 10), layout="constrained")
    figure.suptitle(run.path.resolve().name)
    axes = figure.subplots(3, 2, sharex=True)
    _reward(axes[0, 0], rows)
    _functions(axes[0, 1], rows)
    _lines(axes[1, 0], rows, {"kl": "KL to the reference (nats)"}, "KL")
    _lines(axes[1, 0].twinx(), rows, {"entropy": "entropy (nats)"}, "entropy", color=COLD)
    _lines(axes[1, 1], rows, {"completions/mean_length": "mean", "completions/min_length": "shortest",
                              "completions/max_length": "longest"}, "completion length (tokens)")  # fmt: skip
    _lines(axes[2, 0], rows, {"frac_reward_zero_std": "dead groups", "completions/clipped_ratio": "truncated"}, "share")
    axes[2, 0].set_ylim(-0.03, 1.03)
    _lines(axes[2, 1], rows, {"grad_norm": "gradient norm"}, "gradient norm")
    _share_legend(axes[1, 0], figure.axes[-1])
    has_cold_start = any(COLD_START_STEP in row for row in rows)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step (cold start: up to 0)" if has_cold_start else "optimizer step")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        if has_cold_start:
            axis.axvline(0, color="grey", linestyle="--", linewidth=1)

    out = Path(out) if out else run.path / "report.png"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"Can't write {out} ({error.strerror or error}); choose another file with --output.") from error
    return out


def _reward(axis, rows: list[dict[str, Any]]) -> None:
    steps, values = series(rows, "reward")
    start = sum(step <= 0 for step in steps)
    window = max(1, min(10, (len(values) - start) // 5))
    cold, grpo = values[:start], values[start:]
    if cold:
        axis.plot(steps[:start], cold, color=COLD, linewidth=2, marker="o", label="cold start")
    axis.plot(steps[start:], grpo, color=FAINT, linewidth=1, marker="." if len(grpo) < 60 else None, label="GRPO")
    axis.plot(steps[start:], smooth(grpo, window), color=INK, linewidth=2, label=f"GRPO, mean of {window}")
    for name in dict.fromkeys(key for row in rows for key in row if is_evaluation(key)):
        steps, values = series(rows, name)
        of_data = name.removeprefix("eval_").removesuffix("reward").rstrip("_")
        axis.plot(steps, values, "o", color=EVALUATED if not of_data else None, label=f"evaluation {of_data}".rstrip())
    if best := best_row(rows):
        axis.axvline(best["best/step"], color=EVALUATED, linestyle=":", linewidth=1.5, label="weights that were kept")
    axis.set_ylabel("reward")
    axis.legend(fontsize=8)


def _functions(axis, rows: list[dict[str, Any]]) -> None:
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean"))
    _lines(
        axis, rows, {name: name.split("/", 1)[1].removesuffix("/mean") for name in names}, "mean per reward function"
    )


def _lines(axis, rows: list[dict[str, Any]], labels: dict[str, str], title: str, color: str | None = None) -> None:
    for metric, label in labels.items():
        steps, values = series(rows, metric)
        if values:
            axis.plot(steps, values, linewidth=1.4, label=label, color=color)
    axis.set_ylabel(title)
    if axis.get_lines():
        axis.legend(fontsize=8)


def _share_legend(left, right) -> None:
    """One legend for two axes on the same plot."""
    for axis in (left, right):
        if axis.get_legend():
            axis.get_legend().remove()
    lines = [*left.get_lines(), *right.get_lines()]
    if lines:
        left.legend(lines, [line.get_label() for line in lines], fontsize=8)
