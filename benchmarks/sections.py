"""RESULTS.md's sections beside the kernels': steps, memory, rollouts, the bundled model, rivals, profiles, checks."""

from __future__ import annotations

from pathlib import Path

import memory_tables
import rollout_tables
from text_tables import markdown, number

_FITS = {True: "yes", False: "no", None: "failed"}


def other_sections(rows: list[dict]) -> list[str]:
    lines = []
    steps = [r for r in rows if r.get("part") == "memory" and r.get("fits") is not None]
    steps += [r for r in rows if r.get("what") == "train"]
    if steps:
        header = ["model", "preset", "trainer", "cap GiB", "fits", "peak reserved GiB", "s a step", "why not"]
        body = [
            [
                Path(r["model"]).name, r.get("preset", ""), r["provider"], number(r.get("cap_gib")), _FITS[r["fits"]],
                number(r.get("peak_reserved_gib")), "" if r.get("profile") == memory_tables.BESIDE else
                number(r.get("step_s")), (r.get("error") or "").replace("|", "/"),
            ]
            for r in steps
        ]  # fmt: skip
        lines += ["### Whole training steps under a memory cap", "", *markdown(header, body)]
    if any(r.get("part") == "memory" for r in rows):
        lines += ["### Peak memory, predicted against measured", ""]
        if compared := memory_tables.body(rows):
            said = "Measured: the allocator's reserved peak and the CUDA context. Predicted: `lowvram-grpo plan`."
            lines += [said, "", *markdown(memory_tables.HEADER, compared)]
        lines += [memory_tables.calibration(rows), ""]
    lines += rollout_section(rows)
    trained = [r for r in rows if r.get("part") == "train" and not r.get("error")]
    if trained:
        header = ["steps", "reward, first", "last", "s a step", "peak GiB"]
        keys = ("steps", "reward_first", "reward_last", "step_s", "peak_gib")
        body = [[number(r.get(k), 3) for k in keys] for r in trained]
        lines += ["### The bundled model through the command line", "", *markdown(header, body)]
    theirs = [r for r in rows if r.get("part") == "rivals" and r.get("what") == "loss"]
    if theirs:
        header = ["head", "profile", "rows", "provider", "ms", "peak MiB", ""]
        keys = ("shape", "kind", "N", "provider", "ms_p50", "peak_mib", "error")
        said = "No gate here: the script times what it finds. Its tensors are its own."
        body = [[number(r.get(k)).replace("|", "/") for k in keys] for r in theirs]
        lines += ["### The same by .gpu-stage/rivals.py", "", said, "", *markdown(header, body)]
    return lines + _profiles(rows) + _checks(rows)


def _profiles(rows: list[dict]) -> list[str]:
    """Where the time of a step goes, by share."""
    found = [r for r in rows if r.get("part") == "profile" and r.get("total_us")]
    if not found:
        return []
    body = []
    for r in found:
        first = r["kernels"][0] if r["kernels"] else {"us": 0.0, "name": ""}
        gap = r["gaps"][0] if r["gaps"] else {"us": 0.0, "host": ""}
        body.append([
            r["model"], r["op"], f"{r['total_us'] / 1e3:.2f}", f"{r['busy_us'] / r['total_us']:.0%}",
            str(r["launches"]),
            f"{first['us'] / 1e3:.2f}: `{first['name'][:50]}`", f"{gap['us']:.0f}: `{gap['host'][:40]}`",
        ])  # fmt: skip
    header = ["model", "of", "ms", "busy", "launches", "longest kernel, ms", "longest gap, us, and what the host did"]
    said = "Under torch.profiler, which slows the host: compare shares, not times."
    return ["### Where a step's time goes", "", said, "", *markdown(header, body)]


def _checks(rows: list[dict]) -> list[str]:
    """Tests and checks of the smoke run: how many, and which failed."""
    last = {r["path"]: r for r in rows if r.get("op") == "check"}.values()
    if not last:
        return []
    count = lambda status: sum(r["status"] == status for r in last)
    statuses = [s for s in ("passed", "failed", "crashed", "skipped") if count(s)]
    said = ", ".join(f"{count(status)} {status}" for status in statuses)
    lines = ["### The device's tests and checks", "", f"{said}.", ""]
    wrong = [r for r in last if r["status"] in ("failed", "crashed")]
    body = [[r["path"], r["status"], (r.get("error") or "").replace("|", "/")[:200]] for r in wrong]
    return lines + (markdown(["check", "", "why"], body) if body else [])


def rollout_section(rows: list[dict]) -> list[str]:
    tables = rollout_tables.tables(rows)
    lines = ["### Rollouts", "", rollout_tables.said(rows), ""] if tables else []
    for title, body in tables:
        lines += [f"**{title}**", "", *markdown(rollout_tables.HEADER, body)]
    checked = rollout_tables.graphs(rows)
    return [*lines, checked, ""] if checked else lines
