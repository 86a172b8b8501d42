"""A row of docs/models.md for each family, computed again."""

from __future__ import annotations

import pytest

from tests.families.cells import CELLS
from tests.families.table import PAGE, cells_of, row, versions
from tests.families.zoo import NAMED, Family

# Two training steps: the longest cell.
SLOW = ("plan",)
QUICK = tuple(column for column in CELLS if column not in SLOW)


def check(family: Family, columns: tuple[str, ...]) -> None:
    """What the page says of a family is so. Of other versions of the libraries, that no number is wrong."""
    found = row(family, columns)
    page = PAGE.read_text(encoding="utf-8")
    if versions() not in page:
        pytest.skip(f"the page is of other versions than {versions()}; nothing computed was wrong")
    said = {column: cells_of(page)[family.name][column] for column in columns}
    assert said == found, "python -m tests.families.table > docs/models.md"


def of(*names: str) -> list:
    return [pytest.param(NAMED[name], id=NAMED[name].slug) for name in names]
