"""RESULTS.md's tables of rollouts, from the rows of bench_rollout.py."""

from __future__ import annotations

from collections import defaultdict

HEADER = [
    "completions", "provider", "tokens/s", "x HF generate", "by CPU time", "ms a step", "bound by memory, ms", "share",
    "prefill s", "KV MiB", "peak MiB",
]  # fmt: skip
_CASE = ("model", "weights", "setup", "profile", "prompt")
_SAID = (
    "Providers take turns in one process; medians of the rounds, and of each round's own ratio to transformers' "
    "`generate` (hf-dynamic). A step's bound: bytes of weights, of the prompt once and of each row's own keys and "
    "values at half length, over the bandwidth of the memory, measured in each process ({bandwidth})."
)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _line(row: dict) -> list[str]:
    who = [f"{row['prompts']} x {row['group']}", row["provider"]]
    if why := row.get("error"):
        return [*who, "failed: " + why.replace("|", "/"), *[""] * (len(HEADER) - 3)]
    share = row.get("share_of_limit")
    return [
        *who, _number(row["tokens_per_second"], 0), _number(row.get("speedup"), 2),
        _number(row.get("cpu_speedup"), 2), _number(row.get("step_ms"), 2),
        _number(row.get("limit_ms"), 2), "" if share is None else f"{share:.0%}", _number(row.get("prefill_s"), 3),
        _number(row.get("kv_mib"), 1), _number(row.get("peak_mib"), 0),
    ]  # fmt: skip


def tables(rows: list[dict]) -> list[tuple[str, list[list[str]]]]:
    """(title, lines) of each case; of rows measured twice, the later one."""
    latest: dict[tuple, dict] = {}
    for row in rows:
        if row.get("part") == "rollouts" and row.get("op") == "rollout" and not row.get("missing"):
            latest[(*(row[k] for k in _CASE), row["rows"], row["provider"])] = row
    cases = defaultdict(list)
    order = ("model", "weights", "prompt", "length", "profile", "prompts", "group")
    for row in sorted(latest.values(), key=lambda row: [row[k] for k in order]):
        where = f"{row['threads']} thread of the CPU" if row["gpu"] == "cpu" else row["gpu"]
        what = f"{row['model']}, {row['dtype']}" + ("" if row["weights"] == "none" else f" and {row['weights']}")
        what += "" if row.get("head", "dense") == "dense" else f", {row['head']} head"
        adapter = f"LoRA of rank {row['lora']}" if row["lora"] else "no adapter"
        size = f"prompts of {row['prompt']} and completions of {row['length']} tokens"
        cases[f"{what}, {adapter}, {size}, {row['profile']}; on {where}"].append(_line(row))
    return list(cases.items())


def said(rows: list[dict]) -> str:
    found = sorted({round(r["bandwidth_gbs"]) for r in rows if r.get("bandwidth_gbs")})
    between = " to ".join(f"{x}" for x in ([found[0], found[-1]] if len(found) > 1 else found))
    return _SAID.format(bandwidth=f"{between} GB/s")


def graphs(rows: list[dict]) -> str | None:
    """Whether replaying a step's graph gives what launching it gives."""
    checks = [r for r in rows if r.get("part") == "rollouts" and r.get("op") == "graphs" and r.get("graphs")]
    if not checks:
        return None
    equal, of = sum(r["completions_equal"] for r in checks), sum(r["of"] for r in checks)
    return f"Graph replay and the same steps without a graph: {equal} of {of} completions equal, token for token."
