"""The README's claims, one by one, beside what was measured of them: on which card, with what, at which commit.

`CLAIMS` is the table. A claim's quote stands in the README word for word (a test looks); what no row says anything
about is "not measured". Predicted and modelled numbers are never in the column of measured ones.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kernel_tables import OURS, speedup, tables_of
from memory_tables import BESIDE, as_ever
from text_tables import markdown

NOT = "not measured"
CPU = "cpu"


class Found(NamedTuple):
    """A sentence, and the row whose card, versions and commit it has."""

    said: str
    row: dict


class Claim(NamedTuple):
    """
    Attributes:
        quote: the README's words; None for what it does not claim but a reader asks.
        of: what is measured.
        find: makes at most one finding of the rows of one card and commit.
        cpu: whether the claim is about a CPU.
    """

    quote: str | None
    of: str
    find: Callable[[list[dict]], Found | None]
    cpu: bool = False


def _steps(rows: list[dict], provider: str = "ours") -> list[dict]:
    found = {}
    for r in rows:
        of = r.get("part") == "memory" and r.get("provider") == provider and as_ever(r)
        if of and r.get("total_mib") is not None:
            found[r["model"], r.get("preset"), r.get("profile")] = r
    return list(found.values())


def eight_gigabytes(rows: list[dict]) -> Found | None:
    large = [r for r in _steps(rows) if r["preset"] == "8gb" and Path(r["model"]).name in ("Qwen2.5-7B", "Qwen3-8B")]
    if not large:
        return None
    said = [f"{Path(r['model']).name} {'trains' if r['fits'] else 'does NOT fit'}: {r['total_mib'] / 1024:.2f} GiB of "
            f"{r['cap_gib']:.2f} (predicted {r['predicted_peak_mib'] / 1024:.2f})" for r in large]  # fmt: skip
    return Found("<br>".join(said), large[0])


def predicted_phases(rows: list[dict]) -> Found | None:
    found = []
    for r in _steps(rows):
        for phase, predicted in (r.get("predicted_mib") or {}).items():
            peak = (r.get("phases_mib") or {}).get(phase)
            if peak is not None and r.get("fits"):
                found.append((peak["allocated"] + r["context_mib"]) / predicted - 1)
    if not found:
        return None
    worst = max(found, key=abs)
    said = f"phases of {len(_steps(rows))} runs: measured {min(found):+.1%} to {max(found):+.1%} of what was predicted"
    return Found(f"{said}, the worst {worst:+.1%}", _steps(rows)[0])


def _train_cells(rows: list[dict]) -> Iterator[tuple[tuple, dict[str, dict]]]:
    for case, cells in tables_of(rows)["train"].items():
        if case[3] in ("peaked", "real"):
            yield case, {name: row for name, row in cells.items() if row.get("gate") == "passed" and row.get("ms")}


def no_logits(rows: list[dict]) -> Found | None:
    said, first = [], None
    for (shape, n, _, _), cells in _train_cells(rows):
        ours = [cells[name] for name in OURS if name in cells and cells[name].get("peak_mib") is not None]
        if ours and cells.get("eager", {}).get("peak_mib"):
            first = first or ours[0]
            best = min(ours, key=lambda r: r["ms"])
            said.append(f"{shape}, {n} rows: {best['peak_mib']:.0f} MiB (eager {cells['eager']['peak_mib']:.0f})")
    return Found("<br>".join(said), first) if said else None


def no_more_flop(rows: list[dict]) -> Found | None:
    said, first = [], None
    for (shape, n, _, _), cells in _train_cells(rows):
        ours = [cells[name] for name in OURS if name in cells and cells[name].get("floor_ms")]
        if ours:
            best = min(ours, key=lambda r: r["ms"])
            first = first or best
            times = f"{best['ms']:.2f} ms, {best['ms'] / best['floor_ms']:.2f} x"
            said.append(f"{shape}, {n} rows: {times} the bare product of that shape, "
                        f"{best.get('diffuse_share', 0):.1%} diffuse rows")  # fmt: skip
    return Found("<br>".join(said), first) if said else None


def sweep_beside_rivals(rows: list[dict]) -> Found | None:
    said, first = [], None
    for (shape, n, dtype, profile), cells in _train_cells(rows):
        if best := speedup(cells):
            ours, rival, times = best
            first = first or cells[ours]
            said.append(f"{shape}, {n} rows, {dtype}, {profile}: {times:.2f} x as fast as {rival}")
    return Found("<br>".join(said), first) if said else None


def _rollouts(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(model, head, group, prompt, draws) -> provider -> row."""
    found: dict = defaultdict(dict)
    for r in rows:
        if r.get("op") == "rollout" and r.get("tokens_per_second"):
            case = r["model"], r.get("head", "dense"), r["group"], r["prompt"], r["profile"]
            found[case][r["provider"]] = r
    return found


def rollouts_beside_generate(rows: list[dict]) -> Found | None:
    said, first = [], None
    for (model, head, group, prompt, _), cells in _rollouts(rows).items():
        ours = cells.get("ours")
        if ours and ours.get("speedup"):
            first = first or ours
            share = f", {ours['share_of_limit']:.0%} of the bandwidth's limit" if ours.get("share_of_limit") else ""
            said.append(f"{model}, {head} head, G {group}, {prompt} tokens: {ours['tokens_per_second']:.0f} tokens/s, "
                        f"{ours['speedup']:.2f} x generate{share}")  # fmt: skip
    return Found("<br>".join(said), first) if said else None


def rollouts_on_a_cpu(rows: list[dict]) -> Found | None:
    by_length, first = defaultdict(list), None
    for r in rows:
        if r.get("op") == "rollout" and r.get("provider") == "ours" and r.get("speedup") and r["prompt"] >= 64:
            first = r
            by_length[r["prompt"]].append(r["speedup"])
    said = [f"prompts of {n} tokens: {statistics.median(x):.2f} x generate "
            f"({min(x):.2f} to {max(x):.2f}, {len(x)} rows)"
            for n, x in sorted(by_length.items())]  # fmt: skip
    return Found("<br>".join(said), first) if said else None


def graphs(rows: list[dict]) -> Found | None:
    checks = [r for r in rows if r.get("op") == "graphs" and r.get("graphs")]
    checks += [
        r for r in rows if r.get("op") == "check" and str(r.get("path")).startswith("graphs:") and r.get("graphs")
    ]
    if not checks:
        return None
    equal, of = sum(r["completions_equal"] for r in checks), sum(r["of"] for r in checks)
    gains = [cells["ours"]["tokens_per_second"] / cells["ours-eager"]["tokens_per_second"]
             for cells in _rollouts(rows).values() if {"ours", "ours-eager"} <= set(cells)]  # fmt: skip
    said = f"{equal} of {of} completions are those of the same steps without a graph, token for token"
    if gains:
        said += f"; {min(gains):.2f} to {max(gains):.2f} x as fast as without"
    return Found(said, checks[0])


def step_down(rows: list[dict]) -> Found | None:
    found = [r for r in rows if r.get("op") == "check" and r.get("path") == "oom"]
    if not found:
        return None
    row = found[-1]
    if row["status"] != "passed":
        return Found(f"{row['status'].upper()}: {row.get('error')}", row)
    return Found(f"took {', '.join(row['events'])}, and went on (loss {row['loss'][-1]:.3g})", row)


def tests(rows: list[dict]) -> Found | None:
    found = [r for r in {r["path"]: r for r in rows if r.get("op") == "check"}.values() if r.get("part") == "tests"]
    if not found or all(r["status"] == "skipped" for r in found):
        return None
    count = lambda status: sum(r["status"] == status for r in found)
    said = f"compute capability {found[0].get('capability')}: {count('passed')} tests of tests/gpu pass"
    others = [f"{count(status)} {status}" for status in ("failed", "crashed", "skipped") if count(status)]
    return Found(", ".join([said, *others]), found[0])


def demo(rows: list[dict]) -> Found | None:
    found = [r for r in rows if r.get("part") == "train" and not r.get("error") and r.get("steps")]
    if not found:
        return None
    row = max(found, key=lambda r: r["steps"])
    reward = f"{row['reward_first']:.2f} -> {row['reward_last']:.2f}"
    said = f"the {row['model']} model, {row['steps']} steps through the command line"
    return Found(f"{said}: reward {reward}, {row['step_s']:.2f} s a step", row)


def beside_trl(rows: list[dict]) -> Found | None:
    timed = lambda provider: {(r["model"], r["preset"]): r for r in rows if r.get("part") == "memory"
                              and r.get("provider") == provider and r.get("profile") != BESIDE
                              and r.get("fits") is not None and as_ever(r)}  # fmt: skip
    said, first, theirs = [], None, timed("trl")
    for case, ours in timed("ours").items():
        if (trl := theirs.get(case)) and ours.get("step_s"):
            first = first or ours
            other = (
                f"{trl['step_s'][-1]:.1f} s, {trl['peak_reserved_gib']:.2f} GiB"
                if trl.get("step_s")
                else "out of memory"
            )
            said.append(f"{Path(case[0]).name}, {case[1]}: {ours['step_s'][-1]:.1f} s a step, "
                        f"{ours['peak_reserved_gib']:.2f} GiB; TRL {other}")  # fmt: skip
    return Found("<br>".join(said), first) if said else None


CLAIMS = (
    Claim("Eight billion parameters on eight gigabytes",
          "training steps under the cap of an 8 GB card", eight_gigabytes),
    Claim("`plan` runs the real training step on meta tensors and says, phase by phase, where each MiB goes",
          "peak of each phase beside its prediction", predicted_phases),
    Claim("If memory runs out all the same, it takes the next saver and redoes the same work",
          "two steps, the second with less memory than the first took", step_down),
    Claim("in a fixed workspace: no full-vocabulary logits",
          "peak of forward and backward above the inputs", no_logits),
    Claim("on a trained model's samples no more FLOP than the log-probs alone",
          "time of forward and backward over that of the bare matrix product", no_more_flop),
    Claim("An engine that samples from the very weights that train",
          "rollouts beside generate", rollouts_beside_generate),
    Claim("the decode step in one CUDA graph", "replay beside the same steps launched one by one", graphs),
    Claim("on a CPU 1.3 times as fast at short prompts and 3.6 to 5.2 times at 1,024 tokens",
          "rollouts beside generate on a CPU", rollouts_on_a_cpu, cpu=True),
    Claim("compile for compute capabilities 7.5 to 12.0", "the compiled kernels and paths on a device", tests),
    Claim("watch a small bundled model learn", "the bundled (or a staged) model on a device", demo),
    Claim(None, "the sweep beside the fastest rival", sweep_beside_rivals),
    Claim(None, "a whole step beside TRL's trainer under the same cap", beside_trl),
)  # fmt: skip


def body(rows: list[dict]) -> list[list[str]]:
    """A line a claim and card, as `section` shows them."""
    runs: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        runs[row["gpu"], row["commit"]].append(row)
    lines = []
    for claim in CLAIMS:
        # A claim about a CPU is of all its rows together: they were made in several commits.
        wanted = [[r for r in rows if r["gpu"] == CPU]] if claim.cpu else [
            members for (gpu, _), members in runs.items() if gpu != CPU]  # fmt: skip
        found = [one for members in wanted if (one := claim.find(members))]
        quote = f"“{claim.quote}”" if claim.quote else "(not claimed)"
        for one in found:
            commits = {r["commit"] for r in wanted[0] if r.get("op") == "rollout"} if claim.cpu else {one.row["commit"]}
            lines.append([quote, claim.of, one.said.replace("|", "/"), _where(one.row, commits)])
        if not found:
            lines.append([quote, claim.of, f"**{NOT}**", ""])
    return lines


def _where(row: dict, commits: set[str]) -> str:
    versions = row.get("versions") or {}
    torch = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
    card = "a CPU" if row["gpu"] == CPU else row["gpu"]
    return f"{card}; {torch}; commit {', '.join(sorted(commit[:12] for commit in commits))}"


def section(rows: list[dict]) -> list[str]:
    header = ["the README says", "measured is", "found", "on"]
    return ["## What the README claims", "", *markdown(header, body(rows))]
