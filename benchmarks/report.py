"""RESULTS.md and plots from the rows under benchmarks/results/.

    python benchmarks/report.py [--results DIR] [--to benchmarks/RESULTS.md] [--model-roofline]

Only rows that were measured: those of a dry run are left out. A speed-up compares rows of one file, GPU, commit and set
of versions, and one that failed its gate is in no comparison.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import memory_tables
import rollout_tables

from lowvram_grpo.run import jsonl

HERE = Path(__file__).resolve().parent
COMMAND = "python benchmarks/gpu_suite.py --minutes 25"
# Providers in the order of the tables; names as in providers.py and loss_cases.py.
OURS = ("ours-fused", "ours-cublas", "ours-torch")

PROVIDERS = ("ours-triton", *OURS, "sdpa", "eager", "compiled", "trl", "unsloth", "cce", "torch-lce", "liger")
TITLES = {
    "train": "Log-probs and their gradient to the hidden states",
    "score": "Log-probs without gradient",
    "dense": "As the first, every row by the dense product",
    "kl": "With a reference in the same sweep and the exact KL",
    "int8": "As the first, int8 head",
    "nf4": "As the first, NF4 head",
    "loss": "The GRPO loss from log-probs on",
    "decode": "The attention of one decode step, profile: tokens of prompt + own; sdpa: a cache that is not shared",
}


_FITS = {True: "yes", False: "no", None: "failed"}


class Group(NamedTuple):
    """Rows that may be compared."""

    folder: str
    gpu: str
    commit: str
    versions: tuple

    @property
    def short(self) -> str:
        dirty = " with uncommitted changes" if self.commit.endswith("-dirty") else ""
        return self.commit.removesuffix("-dirty")[:12] + dirty

    @property
    def slug(self) -> str:
        words = "".join(c if c.isalnum() else "-" for c in f"{self.gpu}-{self.commit[:8]}".lower())
        return "-".join(filter(None, words.split("-")))


def load(folder: Path, dry_run: bool = False) -> list[dict]:
    """Every row below `folder`; those of the owner's rivals.py, which name no commit, get that of their header."""
    found = []
    for path in sorted(folder.rglob("*.jsonl")):
        header: dict = {}
        for row in jsonl.read(path):
            if row.get("part") == "rivals":
                header = row
                continue
            if "commit" not in row and header:
                row = {**header, **row, "part": "rivals", "what": row.get("part"), "gpu": header["gpu"]}
            if bool(row.get("dry_run")) == dry_run and row.get("commit"):
                found.append({**row, "file": str(path.relative_to(folder))})
    return found


def grouped(rows: list[dict]) -> dict[Group, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        versions = tuple(sorted((row.get("versions") or {}).items()))
        groups[Group(str(Path(row["file"]).parent), row["gpu"], row["commit"], versions)].append(row)
    return groups


def _sensible(row: dict) -> bool:
    return row.get("ms") is not None and row.get("gate") == "passed"


def tables_of(rows: list[dict]) -> dict[str, dict[tuple, dict[str, dict]]]:
    """op -> (shape, rows, dtype, profile) -> provider -> row; of rows measured twice, the later one."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.get("part") == "kernels" and row.get("provider"):
            case = row["shape"], row.get("rows"), row["dtype"], row["profile"]
            found[row["op"]][case][row["provider"]] = row
    return found


def speedup(cells: dict[str, dict]) -> tuple[str, str, float] | None:
    """(ours, rival, how many times faster our fastest path is than the fastest rival), from green rows alone."""
    fastest = lambda names: min((n for n in names if n in cells and _sensible(cells[n])),
                                key=lambda n: cells[n]["ms"], default=None)  # fmt: skip
    own = {*OURS, "ours-triton"}
    ours, rival = fastest(own), fastest(n for n in cells if n not in own)
    if ours is None or rival is None:
        return None
    return ours, rival, cells[rival]["ms"] / cells[ours]["ms"]


def headlines(rows: list[dict]) -> list[str]:
    """One line a case of `train`, for the end of a run."""
    found = []
    for group, members in grouped(rows).items():
        for case, cells in tables_of(members)["train"].items():
            best = speedup(cells)
            if best:
                ours, rival, times = best
                name = " ".join(map(str, case))
                found.append(
                    f"{group.gpu}: {name}: {ours} {cells[ours]['ms']:.2f} ms, {rival} {cells[rival]['ms']:.2f} ms, "
                    f"{times:.2f} x"
                )
    return found


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if _sensible(row):
        memory = f" / {row['peak_mib']:.0f}" if row.get("peak_mib") is not None else ""
        return f"{row['ms']:.2f}{memory}"
    if row.get("out_of_memory"):
        return "out of memory"
    return "gate failed" if row.get("gate") == "failed" else "failed" if row.get("error") else "-"


def _markdown(header: list[str], body: list[list[str]]) -> list[str]:
    row = lambda cells: "| " + " | ".join(cells) + " |"
    return [row(header), "|" + "---|" * len(header), *map(row, body), ""]


def kernel_section(rows: list[dict]) -> list[str]:
    lines, tables = [], tables_of(rows)
    for op, title in TITLES.items():
        if not tables[op]:
            continue
        names = [n for n in PROVIDERS if any(_cell(cells.get(n)) not in ("", "-") for cells in tables[op].values())]
        body = []
        for case, cells in tables[op].items():
            shape, n, dtype, profile = case
            best = speedup(cells)
            won = "" if best is None else f"{best[2]:.2f} ({best[0].removeprefix('ours-')} : {best[1]})"
            body.append([shape, str(n or ""), dtype, profile, *(_cell(cells.get(name)) for name in names), won])
        lines += [f"### {title}", "", "ms, median / peak MiB above the inputs. Last: best rival's time over ours.", ""]
        lines += _markdown(["head", "rows", "dtype", "profile", *names, "speed-up"], body)
    return lines + _accuracy(tables) + _ceilings(rows, tables) + _absent(tables)


def _accuracy(tables: dict) -> list[str]:
    body = []
    for case, cells in tables["train"].items():
        for name in PROVIDERS:
            row = cells.get(name, {})
            if row.get("error_grad") is not None:
                logps = row.get("error_logps")
                numbers = ["" if logps is None else f"{logps:.1e}", f"{row['error_grad']:.1e}", row.get("gate") or ""]
                body.append([*map(str, case), name, *numbers])
    if not body:
        return []
    header = ["head", "rows", "dtype", "profile", "provider", "log-prob (nats, max)", "gradient (relative)", "gate"]
    return ["### Errors against float64", "", *_markdown(header, body)]


def _ceilings(rows: list[dict], tables: dict) -> list[str]:
    body = []
    for case, cells in tables["train"].items():
        for name in OURS:
            row = cells.get(name, {})
            if row.get("share_of_ceiling") and _sensible(row):
                numbers = [f"{row['ceiling_tflops']:.0f}", f"{row['share_of_ceiling']:.0%}", f"{row['floor_ms']:.2f}"]
                body.append([*map(str, case), name, *numbers, f"{row['diffuse_share']:.1%}"])
    if not body:
        return []
    copies = [f"{r['gbs']:.0f} GB/s" for r in rows if r.get("op") == "ceiling" and r.get("what") == "copy"]
    header = ["head", "rows", "dtype", "profile", "path", "BLAS TFLOP/s", "share", "floor ms (2NVH)", "diffuse rows"]
    said = f"A copy on the device: {', '.join(copies)}, read and written." if copies else ""
    return ["### Share of what the BLAS reaches at the same shape", "", said, "", *_markdown(header, body)]


def _absent(tables: dict) -> list[str]:
    reasons = {}
    for op, cases in tables.items():
        for cells in cases.values():
            for name, row in cells.items():
                why = row.get("missing") or row.get("error") or row.get("gate_reason")
                if why:
                    reasons.setdefault((name, why), set()).add(op)
    if not reasons:
        return []
    body = [[name, ", ".join(sorted(ops)), why.replace("|", "/")] for (name, why), ops in sorted(reasons.items())]
    return ["### Not timed", "", *_markdown(["provider", "operations", "why"], body)]


def _number(value, digits: int = 2) -> str:
    if isinstance(value, list):
        return ", ".join(_number(v, digits) for v in value)
    return "" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def other_sections(rows: list[dict]) -> list[str]:
    lines = []
    steps = [r for r in rows if r.get("part") == "memory" and r.get("fits") is not None]
    steps += [r for r in rows if r.get("what") == "train"]
    if steps:
        header = ["model", "preset", "trainer", "cap GiB", "fits", "peak reserved GiB", "s a step", "why not"]
        body = [
            [
                Path(r["model"]).name, r.get("preset", ""), r["provider"], _number(r.get("cap_gib")), _FITS[r["fits"]],
                _number(r.get("peak_reserved_gib")), _number(r.get("step_s")), (r.get("error") or "").replace("|", "/"),
            ]
            for r in steps
        ]  # fmt: skip
        lines += ["### Whole training steps under a memory cap", "", *_markdown(header, body)]
    if any(r.get("part") == "memory" for r in rows):
        lines += ["### Peak memory, predicted against measured", ""]
        if compared := memory_tables.body(rows):
            said = "Measured: the allocator's reserved peak and the CUDA context. Predicted: `lowvram-grpo plan`."
            lines += [said, "", *_markdown(memory_tables.HEADER, compared)]
        lines += [memory_tables.calibration(rows), ""]
    lines += rollout_section(rows)
    trained = [r for r in rows if r.get("part") == "train" and not r.get("error")]
    if trained:
        header = ["steps", "reward, first", "last", "s a step", "peak GiB"]
        keys = ("steps", "reward_first", "reward_last", "step_s", "peak_gib")
        body = [[_number(r.get(k), 3) for k in keys] for r in trained]
        lines += ["### The bundled model through the command line", "", *_markdown(header, body)]
    theirs = [r for r in rows if r.get("part") == "rivals" and r.get("what") == "loss"]
    if theirs:
        header = ["head", "profile", "rows", "provider", "ms", "peak MiB", ""]
        keys = ("shape", "kind", "N", "provider", "ms_p50", "peak_mib", "error")
        said = "No gate here: the script times what it finds. Its tensors are its own."
        body = [[_number(r.get(k)).replace("|", "/") for k in keys] for r in theirs]
        lines += ["### The same by .gpu-stage/rivals.py", "", said, "", *_markdown(header, body)]
    tests = [r for r in rows if r.get("part") == "suite" and r.get("op") == "tests"]
    if tests and tests[-1].get("counts"):
        lines += [f"Tests on the device: {tests[-1]['counts'].strip('= ')}.", ""]
    return lines


def rollout_section(rows: list[dict]) -> list[str]:
    tables = rollout_tables.tables(rows)
    lines = ["### Rollouts", "", rollout_tables.said(rows), ""] if tables else []
    for title, body in tables:
        lines += [f"**{title}**", "", *_markdown(rollout_tables.HEADER, body)]
    checked = rollout_tables.graphs(rows)
    return [*lines, checked, ""] if checked else lines


def _device(row: dict) -> str:
    return "On a CPU, no GPU" if row["gpu"] == "cpu" else row["gpu"]


def _capabilities(row: dict) -> str:
    if row["gpu"] == "cpu":
        return "Nothing in this section was measured on a GPU"
    return f"Compute capability {row.get('capability')}, {row.get('memory_gib')} GiB, CUDA {row.get('cuda')}"


def document(rows: list[dict], plots: dict[Group, list[str]], roofline: bool) -> str:
    lines = ["# Results", "", "Generated by `python benchmarks/report.py`; edits are lost.", ""]
    if any(row.get("dry_run") for row in rows):
        lines += ["**A dry run: nothing on this page is a measurement.**", ""]
    if not rows:
        lines += [
            "Nothing has been measured yet. On a machine with an NVIDIA card, in the repository root:", "",
            f"    {COMMAND} --out benchmarks/results/NAME", "    python benchmarks/report.py", "",
        ]  # fmt: skip
    for group, members in grouped(rows).items():
        first, last = min(r["utc"] for r in members), max(r["utc"] for r in members)
        one = members[0]
        lines += [
            f"## {_device(one)}, commit {group.short}", "",
            f"{_capabilities(one)}; "
            + ", ".join(f"{name} {version}" for name, version in group.versions)
            + f". Measured {first} to {last}; rows in `{group.folder}`.", "",
            *(f"![{Path(p).stem}]({p})" for p in plots.get(group, [])), "",
            *kernel_section(members), *other_sections(members),
        ]  # fmt: skip
    if roofline:
        from roofline import table

        lines += [*table(), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--to", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--model-roofline", action="store_true", help="add the modelled table for consumer cards")
    parser.add_argument("--dry-rows", action="store_true", help="draw dry-run rows: to look at the layout, elsewhere")
    args = parser.parse_args()
    if args.dry_rows and args.to.resolve() == HERE / "RESULTS.md":
        parser.error("--dry-rows never writes RESULTS.md; give another file with --to")
    rows = load(args.results, dry_run=args.dry_rows) if args.results.is_dir() else []
    plots: dict[Group, list[str]] = {}
    if rows:
        from plots import draw

        for group, members in grouped(rows).items():
            drawn = draw(members, f"{group.gpu}, {group.short}", args.to.parent / "results", group.slug)
            plots[group] = [str(path.relative_to(args.to.parent)) for path in drawn]
    args.to.write_text(document(rows, plots, args.model_roofline), encoding="utf-8")
    print(f"{len(rows)} rows -> {args.to}")


if __name__ == "__main__":
    main()
