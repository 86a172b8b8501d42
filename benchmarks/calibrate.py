"""What constants should be after these rows: a table with the evidence, and the change as a diff. Nothing is applied.

    python benchmarks/calibrate.py ROWS [ROWS ...]     files of rows or folders with some; benchmarks/results by default

Rows of dry runs and of CPUs propose nothing. What a line proposes was measured on the card that it names.
"""

from __future__ import annotations

import argparse
import difflib
from collections import defaultdict
from pathlib import Path

import report
from constants import CONSTANTS, Constant, Proposal, measured

from lowvram_grpo.bench.rows import ROOT
from lowvram_grpo.run import jsonl


def rows_of(paths: list[Path]) -> list[dict]:
    found = []
    for path in paths:
        found += report.load(path) if path.is_dir() else jsonl.read(path)
    return measured(found)


def proposals(rows: list[dict], root: Path = ROOT) -> list[tuple[Constant, str | None, Proposal]]:
    """(constant, its value now, what the rows say), of constants that they say anything about."""
    found = []
    for constant in CONSTANTS:
        now = constant.now(root)
        proposal = constant.propose(rows, now)
        if proposal:
            found.append((constant, now, proposal))
    return found


def changed(found: list[tuple[Constant, str | None, Proposal]], root: Path = ROOT) -> str:
    """A unified diff of what would become other."""
    texts: dict[str, str] = {}
    for constant, now, proposal in found:
        if now is None or now == proposal.value:
            continue
        before = texts.setdefault(constant.file, (root / constant.file).read_text(encoding="utf-8"))
        place = constant.search(before)
        texts[constant.file] = before[: place.start(1)] + proposal.value + before[place.end(1) :]
    lines: list[str] = []
    for file, after in texts.items():
        before = (root / file).read_text(encoding="utf-8")
        lines += difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{file}", f"b/{file}")
    return "".join(lines)


def page(rows: list[dict], root: Path = ROOT) -> str:
    found = proposals(rows, root)
    other = [one for one in found if one[1] != one[2].value]
    if not found:
        return "nothing to propose: no rows of a GPU say anything about a constant.\n"
    lines = []
    groups: dict[str, list] = defaultdict(list)
    for one in found:
        groups["proposed" if one in other else "as it is"].append(one)
    for title, members in groups.items():
        lines += [f"== {title}"]
        for constant, now, proposal in members:
            where = f"   ({constant.file})" if constant.file else ""
            before = f"{now or 'not found in the source'} -> " if constant.file else ""
            lines += [f"{constant.name}: {before}{proposal.value}{where}"]
            lines += [f"    {line}" for line in proposal.evidence]
        lines += [""]
    if not other:
        lines.append("nothing to propose: every constant that was measured is as the rows say.")
    diff = changed(found, root)
    return "\n".join(lines) + ("\n" + diff if diff else "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="*", default=[report.HERE / "results"])
    paths = parser.parse_args().rows
    if missing := [str(path) for path in paths if not path.exists()]:
        parser.error(f"there is no {', '.join(missing)}")
    print(page(rows_of(paths)), end="")


if __name__ == "__main__":
    main()
