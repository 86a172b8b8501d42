"""RESULTS.md's tables of kernels, from the rows of bench_kernels.py and bench_decode_attention.py."""

from __future__ import annotations

from collections import defaultdict

from text_tables import markdown

# Providers in the order of the tables; names as in providers.py and loss_cases.py.
OURS = ("ours-fused", "ours-cublas", "ours-torch")

PROVIDERS = ("ours-triton", *OURS, "sdpa", "eager", "compiled", "trl", "unsloth", "cce", "torch-lce", "liger",
             "liger-compiled")  # fmt: skip
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


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if _sensible(row):
        memory = f" / {row['peak_mib']:.0f}" if row.get("peak_mib") is not None else ""
        return f"{row['ms']:.2f}{memory}"
    if row.get("out_of_memory"):
        return "out of memory"
    return "gate failed" if row.get("gate") == "failed" else "failed" if row.get("error") else "-"


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
        lines += markdown(["head", "rows", "dtype", "profile", *names, "speed-up"], body)
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
    return ["### Errors against float64", "", *markdown(header, body)]


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
    return ["### Share of what the BLAS reaches at the same shape", "", said, "", *markdown(header, body)]


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
    return ["### Not timed", "", *markdown(["provider", "operations", "why"], body)]
