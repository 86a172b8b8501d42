"""The constants that rows of a GPU settle: where each stands, and what the rows say it should be.

One table, `CONSTANTS`. A proposal needs rows of a card, none of a dry run; each says on how many rows it rests, and on
which card, for a constant that an H100 proposes may be wrong for the cards that this is about: a person decides.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import bench_decode_ops
import memory_tables

from lowvram_grpo.bench.rows import ROOT

# A rollout that is faster by less is no reason to change a constant.
GAIN = 0.03


class Proposal(NamedTuple):
    """`value` as the source would have it; `evidence` in lines for people."""

    value: str
    evidence: list[str]


class Constant(NamedTuple):
    """A value in the source: the first group of `pattern` in `file`. `propose` gets the rows and the value as it is
    (None where it was not found), and returns None where the rows say nothing."""

    name: str
    file: str | None
    pattern: str
    propose: Callable[[list[dict], str | None], Proposal | None]

    def now(self, root: Path = ROOT) -> str | None:
        """The value in the source below `root`; None where it isn't found."""
        if self.file is None or not (root / self.file).is_file():
            return None
        found = self.search((root / self.file).read_text(encoding="utf-8"))
        return found and " ".join(found[1].split())

    def search(self, text: str) -> re.Match | None:
        return re.search(self.pattern, text)


def measured(rows: Iterable[dict]) -> list[dict]:
    """Rows of a card that were measured."""
    return [row for row in rows if not row.get("dry_run") and row.get("gpu") not in (None, "cpu")]


def cards(rows: Iterable[dict]) -> str:
    return ", ".join(sorted({f"{row['gpu']} at {str(row.get('commit'))[:12]}" for row in rows}))


def _overhead(rows: list[dict]) -> list[dict]:
    return [row for row in memory_tables.measured(rows) if row.get("context_known")]


def context(rows: list[dict], now: str | None) -> Proposal | None:
    found = _overhead(rows)
    if not found:
        return None
    sizes = [row["context_mib"] for row in found]
    most = 10 * math.ceil(max(sizes) / 10)
    if now and abs(most - float(now)) <= 0.05 * float(now):
        most = int(now)
    return Proposal(str(most), [f"{len(found)} runs, {min(sizes):.0f} to {max(sizes):.0f} MiB, on {cards(found)}"])


def fragmentation(rows: list[dict], now: str | None) -> Proposal | None:
    found = [row for row in memory_tables.measured(rows) if row.get("fragmentation") is not None]
    if not found:
        return None
    shares = [row["fragmentation"] for row in found]
    most = math.ceil(100 * max(shares) - 1e-6) / 100
    return Proposal(f"{most:g}", [f"{len(found)} runs, {min(shares):.3f} to {max(shares):.3f}, on {cards(found)}"])


def unseen(rows: list[dict], now: str | None) -> Proposal | None:
    """Tensors at the peak beyond those that the ledger counted: libraries' workspaces, as far as anyone knows."""
    found = memory_tables.measured(rows)
    if not found:
        return None
    sizes = [row["unseen_mib"] for row in found]
    # Below nothing the prediction was too high, which no workspace explains.
    most = max(0, math.ceil(max(sizes)))
    if now and abs(most - int(now)) <= 4:
        most = int(now)
    said = f"{len(found)} runs, {min(sizes):+.0f} to {max(sizes):+.0f} MiB beyond the ledger's, on {cards(found)}"
    return Proposal(str(most), [said])


def stands_behind(rows: list[dict], now: str | None) -> Proposal | None:
    found = _overhead(rows)
    return Proposal("True", [f"{len(found)} runs with a context of their own, on {cards(found)}"]) if found else None


def faster_kinds(rows: list[dict], now: str | None) -> Proposal | None:
    found = [row for row in rows if row.get("part") == "decode_ops"]
    by_card = defaultdict(list)
    for row in found:
        by_card[row["gpu"], row["commit"]].append(row)
    won: dict[str, bool] = {}
    for members in by_card.values():
        for kind, faster in bench_decode_ops.faster(members).items():
            won[kind] = won.get(kind, True) and faster
    if not won:
        return None
    # Kinds that this benchmark does not know stay as they are.
    kept = [kind for kind in re.findall(r'"(\w+)"', now or "") if won.get(kind, True)]
    names = kept + [kind for kind, faster in won.items() if faster and kind not in kept]
    value = "(" + ", ".join(f'"{kind}"' for kind in names) + ("," if len(names) == 1 else "") + ")"
    evidence = [f"{kind}: fused {'faster' if faster else 'NOT faster'} in every case" for kind, faster in won.items()]
    said = [*evidence, f"{len(found)} rows, on {cards(found)}", *_whole_rollouts(rows), *_whole_steps(rows)]
    return Proposal(value, said)


def _whole_rollouts(rows: list[dict]) -> list[str]:
    """Tokens a second with every kernel against none, for each case that has both."""
    cases: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.get("op") == "rollout" and row.get("tokens_per_second"):
            case = row["gpu"], row["commit"], row["model"], row["setup"], row["tokens"]
            cases[case][row["provider"]] = row["tokens_per_second"]
    return [
        f"whole rollout, {model}, {setup}: fused_ops on is {c['ours-fused'] / c['ours-unfused']:.2f} x off"
        for (_, _, model, setup, _), c in cases.items()
        if {"ours-fused", "ours-unfused"} <= set(c)
    ]


def _steps_by(rows: list[dict], setting: str) -> dict[tuple, dict[str, dict]]:
    """(card, commit, model) -> value of `setting` -> row of whole training steps with the card to themselves."""
    cases: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        chosen = re.search(rf"\b{setting}=(\w+)", row.get("setup") or "")
        if chosen and row.get("step_s") and row.get("profile") != memory_tables.BESIDE:
            cases[row["gpu"], row["commit"], row["model"]][chosen[1]] = row
    return cases


def _whole_steps(rows: list[dict]) -> list[str]:
    """What is the only word on kernels with a gradient, and on layers that compute together."""
    return [
        f"whole step, {model}, on {gpu}: fused_ops {name} is {c['off']['step_s'][-1] / c[name]['step_s'][-1]:.2f} x off"
        for (gpu, _, model), c in _steps_by(rows, "fused_ops").items()
        for name in ("auto", "on")
        if {"off", name} <= set(c)
    ]


def fused_width(rows: list[dict], now: str | None) -> Proposal | None:
    """The widest head up to which the fused path won every case."""
    cases: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in rows:
        green = row.get("gate") == "passed" and row.get("ms") and row.get("width")
        if green and row.get("op") == "train" and row.get("profile") in ("peaked", "real"):
            case = row["width"], row["shape"], row["rows"], row["dtype"], row["gpu"], row["commit"]
            cases[case][row["provider"]] = row["ms"]
    both = {
        case: c["ours-cublas"] / c["ours-fused"] for case, c in cases.items() if {"ours-fused", "ours-cublas"} <= set(c)
    }
    if not both:
        return None
    ratios = defaultdict(list)
    for (width, *_), ratio in both.items():
        ratios[width].append(ratio)
    widths, widest, loses = sorted(ratios), 0, None
    for width in widths:
        if min(ratios[width]) <= 1:
            loses = width
            break
        widest = width
    said = [f"width {w}: cuBLAS takes {min(ratios[w]):.2f} to {max(ratios[w]):.2f} times as long" for w in widths]
    said.append("on " + ", ".join(sorted({f"{gpu} at {str(commit)[:12]}" for *_, gpu, commit in both})))
    # Between the widest that won and the next that was measured, nothing speaks against what is there.
    kept = now and widest <= int(now) < (loses or math.inf)
    return Proposal(now if kept else str(widest), said)


def _knob(name: str) -> Callable[[list[dict], str | None], Proposal | None]:
    def propose(rows: list[dict], now: str | None) -> Proposal | None:
        runs: dict[tuple, dict[int, dict]] = defaultdict(dict)
        for row in rows:
            if row.get("part") == "knobs" and row.get("op") == name and row.get("seconds"):
                runs[row["gpu"], row["commit"], row["model"], row["process"]][row["value"]] = row
        whole = [r for r in runs.values() if now and int(now) in r]
        if not whole:
            return None
        common = set.intersection(*(set(r) for r in whole))
        gain = lambda v: math.prod(r[int(now)]["seconds"] / r[v]["seconds"] for r in whole) ** (1 / len(whole))
        best = max(common, key=gain)
        value = str(best) if gain(best) > 1 + GAIN else now
        said = [f"{v}: {gain(v):.3f} x as fast as {now}, peak {max(r[v]['peak_mib'] for r in whole):.0f} MiB"
                for v in sorted(common)]  # fmt: skip
        return Proposal(value, [*said, f"{len(whole)} models, on {cards(r for run in whole for r in run.values())}"])

    return propose


def attention(rows: list[dict], now: str | None) -> Proposal | None:
    """Which attention `auto` should take: by whole training steps, the others of the card away."""
    cases = _steps_by(rows, "attention")
    both = {case: c for case, c in cases.items() if {"sdpa", "xformers"} <= set(c)}
    if not both:
        return None
    ratios = {case: c["sdpa"]["step_s"][-1] / c["xformers"]["step_s"][-1] for case, c in both.items()}
    said = [f"{model} on {gpu} (compute capability {both[gpu, commit, model]['sdpa'].get('capability')}): "
            f"xformers {ratio:.2f} x as fast" for (gpu, commit, model), ratio in ratios.items()]  # fmt: skip
    choice = "xformers" if min(ratios.values()) > 1 + GAIN else "sdpa"
    return Proposal(choice, said)


_OVERHEADS = "lowvram_grpo/memory/overheads.py"
_DECODE = "lowvram_grpo/rollout/decode.py"
CONSTANTS = (
    Constant("CUDA context, MiB", _OVERHEADS, r"CUDA = Overheads\([^)]*?context=(\d+) \* MIB", context),
    Constant("cublas, MiB", _OVERHEADS, r"CUDA = Overheads\([^)]*?cublas=(\d+) \* MIB", unseen),
    Constant("fragmentation", _OVERHEADS, r"CUDA = Overheads\([^)]*?fragmentation=([\d.]+)", fragmentation),
    Constant("overheads measured", _OVERHEADS, r"CUDA = Overheads\([^)]*?measured=(\w+)", stands_behind),
    Constant("fused_ops auto", "lowvram_grpo/policy/trials.py",
             r"\n(?:MEASURED|EXPECTED)_FASTER(?:: [^=\n]+)? = (\([^)]*\))", faster_kinds),
    Constant("FUSED_MAX_WIDTH", "kernels/sweep/launch.py", r"\nFUSED_MAX_WIDTH = (\d+)", fused_width),
    Constant("PREFILL_TOKENS", _DECODE, r"\nPREFILL_TOKENS = (\d+)", _knob("prefill_tokens")),
    Constant("look_every", _DECODE, r'every = look_every or \(1 if [^)]* else (\d+)\)', _knob("look_every")),
    # By card, so there is no one number to change.
    Constant("attention auto", None, "", attention),
)  # fmt: skip
