"""Tables and numbers of RESULTS.md."""

from __future__ import annotations


def markdown(header: list[str], body: list[list[str]]) -> list[str]:
    row = lambda cells: "| " + " | ".join(cells) + " |"
    return [row(header), "|" + "---|" * len(header), *map(row, body), ""]


def number(value, digits: int = 2) -> str:
    if isinstance(value, list):
        return ", ".join(number(v, digits) for v in value)
    return "" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
