"""PNG plots of one group of rows: time and memory by head, tokens a second, peaks under the cap, a learning run."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from kernel_tables import OURS, PROVIDERS, tables_of
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from memory_tables import BESIDE

from lowvram_grpo.bench.plots import draw as stacked

BLUES = ("#0b3c6f", "#2f7fc1", "#8cc0ea")
OTHERS = ("#4d4d4d", "#7a5195", "#e07b39", "#59a14f", "#b5a642", "#d37295", "#9c755f", "#c44e52", "#17becf", "#8c6d31")
COLOURS = {**dict(zip(OURS, BLUES)), **dict(zip([p for p in PROVIDERS if p not in OURS], OTHERS))}
assert set(PROVIDERS) == set(COLOURS)


def draw(rows: list[dict], title: str, folder: Path, slug: str) -> list[Path]:
    """Files written; none where there is nothing to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    cases = tables_of(rows)["train"]
    kinds = sorted({(n, dtype, profile) for _, n, dtype, profile in cases}, key=str)
    for n, dtype, profile in kinds:
        chosen = {case[0]: cells for case, cells in cases.items() if case[1:] == (n, dtype, profile)}
        path = folder / f"{slug}-train-{n}-{dtype}-{profile}.png"
        if _bars(chosen, f"log-probs and gradient, {n} rows, {dtype}, {profile}\n{title}", path):
            drawn.append(path)
    if rollouts := [r for r in rows if r.get("op") == "rollout" and r.get("tokens_per_second") and r["gpu"] != "cpu"]:
        drawn += _rollouts(rollouts, title, folder / f"{slug}-rollouts.png")
    learned = [r for r in rows if r.get("part") == "train" and len(r.get("rewards") or ()) > 3]
    if learned and learned[-1]["gpu"] != "cpu":
        drawn.append(_rewards(max(learned, key=lambda r: len(r["rewards"])), title, folder / f"{slug}-reward.png"))
    steps = [r for r in rows if r.get("part") == "memory" and r.get("peak_reserved_gib")]
    if steps:
        path = folder / f"{slug}-memory.png"
        _memory(steps, title, path)
        drawn += [path, *stacked([r for r in steps if r["provider"] == "ours"], folder, f"{slug}-memory")]
    return drawn


def _bars(cases: dict[str, dict], title: str, path: Path) -> bool:
    """Two panels, ms and MiB, a group of bars a head; a provider without a time has no bar."""
    green = lambda row, key: row.get(key) if row.get("gate") == "passed" else None
    names = [p for p in PROVIDERS if any(green(cells.get(p, {}), "ms") for cells in cases.values())]
    if not names:
        return False
    memory = any(green(cells.get(p, {}), "peak_mib") for cells in cases.values() for p in names)
    panels = [("ms", "ms"), ("peak_mib", "peak MiB above the inputs")][: 1 + memory]
    figure, axes = plt.subplots(len(panels), 1, figsize=(max(7, 2.2 * len(cases)), 3.4 * len(panels)), squeeze=False)
    for axis, (key, label) in zip(axes[:, 0], panels):
        width = 0.85 / len(names)
        for i, name in enumerate(names):
            at = [x + (i - (len(names) - 1) / 2) * width for x in range(len(cases))]
            heights = [green(cells.get(name, {}), key) or float("nan") for cells in cases.values()]
            axis.bar(at, heights, width * 0.92, label=name, color=COLOURS[name])
        axis.set_xticks(range(len(cases)), list(cases))
        axis.set_ylabel(label)
        _logarithmic(axis)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_title(title, fontsize=10)
    axes[0, 0].legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return True


def _rollouts(rows: list[dict], title: str, path: Path) -> list[Path]:
    """Tokens a second of each provider, a group of bars a case, and the line that the memory's bandwidth draws."""
    cases: dict[str, dict[str, dict]] = {}
    for r in rows:
        case = f"{r['model']}\n{r.get('head', 'dense')} head, G {r['group']}\n{r['prompt']} + {r['length']} tokens"
        cases.setdefault(case, {})[r["provider"]] = r
    order = ("ours", "ours-fused", "ours-unfused", "ours-eager", "ours-int8", "ours-merged", "hf-dynamic", "hf-static",
             "hf-continuous")  # fmt: skip
    names = [n for n in order if any(n in cells for cells in cases.values())]
    shades = (*BLUES, "#5aa9a3", "#b9dbd8", "#16355c")
    own = [n for n in names if n.startswith("ours")]
    colours = dict(zip(own, shades)) | dict(zip([n for n in names if n not in own], OTHERS))
    figure, axis = plt.subplots(figsize=(max(7, 1.7 * len(cases)), 4.2))
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        at = [x + (i - (len(names) - 1) / 2) * width for x in range(len(cases))]
        heights = [cells.get(name, {}).get("tokens_per_second") or float("nan") for cells in cases.values()]
        axis.bar(at, heights, width * 0.92, label=name, color=colours[name])
    for x, cells in enumerate(cases.values()):
        best = next((cells[n] for n in names if cells.get(n, {}).get("limit_ms")), None)
        if best:
            rows_at_once = best["tokens_per_second"] * best["seconds"] / best["length"]
            bound = rows_at_once / best["limit_ms"] * 1e3
            axis.plot([x - 0.45, x + 0.45], [bound, bound], color="#b3002d", linewidth=1.5,
                      label="bound by bandwidth" if x == 0 else None)  # fmt: skip
    axis.set_xticks(range(len(cases)), list(cases), fontsize=8)
    axis.set_ylabel("tokens a second")
    _logarithmic(axis)
    _finish(figure, axis, title, path)
    return [path]


def _rewards(row: dict, title: str, path: Path) -> Path:
    """The mean reward of each step, and its mean over ten."""
    rewards = row["rewards"]
    figure, axis = plt.subplots(figsize=(7, 3.2))
    axis.plot(range(1, len(rewards) + 1), rewards, color=BLUES[2], linewidth=1, label="a step's mean")
    means = [sum(rewards[max(0, i - 9) : i + 1]) / len(rewards[max(0, i - 9) : i + 1]) for i in range(len(rewards))]
    axis.plot(range(1, len(rewards) + 1), means, color=BLUES[0], label="of the last ten")
    axis.set_xlabel("step")
    axis.set_ylabel("reward")
    _finish(figure, axis, f"the {row['model']} model through the command line\n{title}", path)
    return path


def _logarithmic(axis) -> None:
    """With plain numbers at 1, 2 and 5."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _finish(figure, axis, title: str, path: Path) -> None:
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _memory(steps: list[dict], title: str, path: Path) -> None:
    """A bar a run, and its cap."""
    figure, axis = plt.subplots(figsize=(7.5, 0.9 + 0.36 * len(steps)))
    colour = lambda r: "#c44e52" if not r["fits"] else BLUES[1] if r["provider"] == "ours" else OTHERS[0]
    for i, r in enumerate(steps):
        axis.barh(i, r["peak_reserved_gib"], 0.7, color=colour(r))
        axis.plot([r["cap_gib"]] * 2, [i - 0.42, i + 0.42], color="#b3002d", linewidth=1.6)
        said = {True: "fits", False: "out of memory", None: "failed"}[r["fits"]]
        if r.get("step_s") and r.get("profile") != BESIDE:
            said = f"{r['step_s'][-1]:.1f} s a step"
        axis.text(max(r["peak_reserved_gib"], r["cap_gib"]), i, f"  {said}", va="center", fontsize=8)
    names = [f"{Path(r['model']).name} {r.get('preset', '')} {r['provider']}" for r in steps]
    axis.set_yticks(range(len(steps)), names, fontsize=8)
    axis.set_xlim(0, 1.3 * max(*(r["cap_gib"] for r in steps), *(r["peak_reserved_gib"] for r in steps)))
    axis.invert_yaxis()
    axis.set_xlabel("peak reserved GiB; red: the cap, which holds the CUDA context too")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
