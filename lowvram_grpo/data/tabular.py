"""What is wrong with a csv or json file, and what a person meant by it: separators, ragged rows, objects of columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.messages import is_messages
from lowvram_grpo.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


def csv_options(file: Path, what: str, *, whole: bool = True) -> dict[str, Any]:
    """Arguments of the csv reader for a UTF-8 file.

    Args:
        what: the file as it begins a sentence.
        whole: look at every row, not at the first hundred alone.

    Raises:
        UserError: two columns have one name, or a row has more fields than the header. The reader renames the first
            and takes the second's first field for an index: every column after it is shifted.
    """
    csv.field_size_limit(2**31 - 1)
    # As Excel writes it where the comma is the decimal sign; a tsv that has no tab in its header is none.
    separator = _separator(file, "\t" if file.suffix.lower() == ".tsv" else ",")
    rows = _rows(file, separator, what)
    _, header = next(rows, (0, []))
    for name in header:
        if name and header.count(name) > 1:
            raise UserError(f"{what} has {header.count(name)} columns called {name!r}; give each a name of its own.")
    for line, row in rows if whole else islice(rows, 100):
        if len(row) > len(header) and any(row[len(header) :]):
            sign = _SEPARATORS[separator]
            raise UserError(
                f"{what} has {len(row)} fields in line {line}, but {len(header)} columns in its header; put text that "
                f"holds a {sign} into double quotes."
            )
    # Of pandas' words for a missing value (NA, None, nan, null ...) each may be somebody's answer.
    return {"sep": separator, "index_col": False, "keep_default_na": False, "na_values": [""]}


def _separator(file: Path, usual: str) -> str:
    with open(file, encoding="utf-8-sig", newline="") as text:
        header = next((line for line in text if line.strip()), "")
    counts = {sign: header.count(sign) for sign in _SEPARATORS}
    return usual if counts[usual] or not any(counts.values()) else max(counts, key=counts.__getitem__)


def _rows(file: Path, separator: str, what: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each row that is not blank."""
    with open(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=separator)
        try:
            yield from ((reader.line_num, row) for row in reader if row)
        except csv.Error as error:
            raise UserError(f"{what} is no csv ({error} in line {reader.line_num}).") from error


def json_mistake(file: Path) -> str:
    """What makes a UTF-8 file neither JSON nor JSON lines; empty if nothing does."""
    text = file.read_text(encoding="utf-8-sig")
    if not text.strip():
        return ""
    try:
        found = json.loads(text)
    except ValueError as whole:
        if text.lstrip().startswith("[") and file.suffix.lower() == ".json":
            return f"it is no JSON ({whole})"
    else:
        return "" if isinstance(found, (dict, list)) else "a row must be an object, {...}, with the columns as its keys"
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            hint = ", without a comma behind it" if line.rstrip().endswith("},") else ""
            at = f"line {number} is no JSON ({error.msg} at column {error.colno})"
            return f"{at}; json lines hold one whole object a line{hint}"
        if not isinstance(row, dict):
            return f"line {number} is no object, {{...}}, with the columns as its keys"
    return ""


def unfolded(found: DatasetDict) -> DatasetDict:
    """The rows of a json file that is one object: of columns (`{"prompt": [...], "answer": [...]}`, pandas' way too) or
    with the rows under one of its keys (`{"version": 1, "data": [{...}, ...]}`). Any other file as it is."""
    from datasets import DatasetDict

    return DatasetDict({name: _unfolded(split) if len(split) == 1 else split for name, split in found.items()})


def _unfolded(split: Dataset) -> Dataset:
    from datasets import Dataset

    row = split[0]
    tables = [value for value in row.values() if _is_table(value)]
    if len(tables) == 1 and not any(
        isinstance(value, (list, dict)) for value in row.values() if value is not tables[0]
    ):
        return Dataset.from_list(tables[0])
    columns = {name: _column(value) for name, value in row.items()}
    if None in columns.values() or len({len(column) for column in columns.values()}) != 1:
        return split
    return Dataset.from_dict(columns)


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value) and not is_messages(value)
    )


def _column(value: Any) -> list | None:
    """A column's values: a list that is no conversation, or pandas' `{"0": ..., "1": ...}`."""
    if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
        return [value[key] for key in sorted(value, key=int)]
    return value if isinstance(value, list) and value and not is_messages(value) else None
