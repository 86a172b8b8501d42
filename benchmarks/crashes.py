"""What a smoke run found, on one page: every check that failed, each distinct fault once, and what did not run.

python benchmarks/crashes.py ROWS_OR_FOLDER [--to smoke.txt]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from lowvram_grpo.run import jsonl

FIRST_LINES = 14


def checks(rows: list[dict]) -> dict[str, dict]:
    """The last row of each check and test."""
    return {row["path"]: row for row in rows if row.get("op") == "check"}


def not_ended(rows: list[dict]) -> tuple[list[str], list[str]]:
    """(begun and not ended, tests that were collected and never begun)."""
    ended, begun = set(checks(rows)), [row["path"] for row in rows if row.get("op") == "began"]
    known = dict.fromkeys(name for row in rows if row.get("op") == "collected" for name in row["tests"])
    hung = [name for name in dict.fromkeys(begun) if name not in ended]
    return hung, [name for name in known if name not in ended and name not in begun]


def faults(rows: list[dict]) -> dict[str, list[dict]]:
    """Failed and crashed checks by the signature of their traceback, the most frequent first. What failed in a
    process whose CUDA context another check had lost would not be here: such a process ends."""
    found = defaultdict(list)
    for row in checks(rows).values():
        if row["status"] in ("failed", "crashed"):
            found[row.get("signature") or row.get("error") or "?"].append(row)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def telling(trace: str) -> list[str]:
    """The first lines of a traceback that say what went wrong: pytest's marked ones, else its end."""
    lines = trace.splitlines()
    marked = [line for line in lines if line.startswith(("E ", ">")) or ".py:" in line]
    return (marked or [line for line in lines if line.strip()][-FIRST_LINES:])[:FIRST_LINES]


def latest(rows: list[dict]) -> list[dict]:
    """Of the card and commit that the last row is of: what another commit failed may be mended."""
    last = next((row for row in reversed(rows) if row.get("commit")), {})
    return [row for row in rows if all(row.get(key) == last.get(key) for key in ("gpu", "commit", "dry_run"))]


def page(rows: list[dict]) -> str:
    rows = latest(rows)
    suite = [row for row in rows if row.get("part") == "suite"]
    first = next(iter(suite or rows), {})
    found, by = checks(rows), faults(rows)
    count = lambda status: sum(row["status"] == status for row in found.values())
    lines = [
        f"Smoke run on {first.get('gpu')}, commit {first.get('commit')}{' (dry run)' * bool(first.get('dry_run'))}",
        ", ".join(f"{name} {number}" for name, number in (first.get("versions") or {}).items()),
        f"{count('passed')} passed, {count('failed')} failed, {count('crashed')} ended their process, "
        f"{count('skipped')} skipped; {len(by)} distinct faults.",
    ]  # fmt: skip
    hung, never = not_ended(rows)
    lines += [f"begun and not ended (it hangs, or time ran out): {name}" for name in hung]
    if never:
        lines.append(f"never begun: {len(never)}: {', '.join(never[:20])}{' ...' if len(never) > 20 else ''}")
    lines += ["", "== jobs"]
    lines += [f"{row['op']:22} {row['status']:14} {row['seconds']:7.1f} s" for row in suite if "seconds" in row]
    imports = found.get("imports", {})
    lines += [f"not importable: {'; '.join(imports['missing'])}"] if imports.get("missing") else []
    lines += ["", "== checks"]
    lines += [f"{r['status']:8} {r['path']}" for r in found.values() if r.get("part") == "smoke"]
    errors = [row for row in rows if row.get("error") and row.get("op") != "check"]
    lines += [f"error in {r.get('part')} {r.get('op')} {r.get('model') or ''}: {r['error']}" for r in errors]
    lines += ["", f"== {len(by)} distinct faults, first lines"]
    for number, (signature, members) in enumerate(by.items(), 1):
        lines += ["", f"[{number}] {len(members)} x  {signature}"]
        lines += [f"    {row['status']} {row['path']}" for row in members[:12]]
        lines += [f"    ... and {len(members) - 12} more"] if len(members) > 12 else []
        lines += [f"      | {line}" for line in telling(members[0].get("trace") or members[0].get("error") or "")]
    lines += ["", "== the whole traceback of the first of each"]
    for number, members in enumerate(by.values(), 1):
        lines += ["", f"[{number}] {members[0]['path']}", members[0].get("trace") or members[0].get("error") or ""]
    skipped = defaultdict(list)
    for row in found.values():
        if row["status"] == "skipped":
            skipped[row.get("why")].append(row["path"])
    lines += ["", "== skipped", *(f"{len(names)} x {why}: {names[0]}" for why, names in skipped.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    if not args.rows.exists():
        parser.error(f"there is no {args.rows}")
    files = sorted(args.rows.rglob("*.jsonl")) if args.rows.is_dir() else [args.rows]
    text = page([row for file in files for row in jsonl.read(file)])
    if args.to:
        args.to.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
