"""Append-only JSON lines that survive `kill -9` in the middle of a row."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lowvram_grpo.errors import CantWrite


class Log:
    """Rows for the end of a file; `held` ones wait in memory until `release` is called.

    A resumed run holds its rows until its first step has succeeded: before that, the file is the earlier process's.
    """

    def __init__(self, path: str | Path, *, held: bool = False):
        self.path = Path(path)
        self._held: list[dict[str, Any]] | None = [] if held else None

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        if self._held is None:
            append(self.path, rows)
        else:
            self._held.extend(rows)

    def release(self) -> None:
        """Write what was held, and from now on at once."""
        rows, self._held = self._held, None
        if rows:
            append(self.path, rows)


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` at the end of `path`, one a line; they are out of this process's buffers when this returns.

    NaN and infinities become null (JSON has neither); tensor and NumPy scalars become numbers.

    Raises:
        CantWrite: the disk is full, or forbids it.
    """
    text = "".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    # A lone surrogate has no UTF-8 form; backslashreplace writes it as the JSON escape that it is.
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise CantWrite(path, error) from error


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows of `path` in order; [] if it does not exist. A row torn by a killed process is left out."""
    if not path.is_file():
        return []
    rows = []
    # Not str.splitlines(): it also splits at U+2028, which JSON strings may hold.
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that are not `wanted`, and torn ones. The file is replaced in one step: never half written."""
    if not path.is_file():
        return
    rows = [row for row in read(path) if wanted(row)]
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    append(temporary, rows)
    os.replace(temporary, path)


def plain(value: Any) -> Any:
    """`value` as JSON can carry it: NaN and infinities None, tensors and arrays numbers and lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "tolist"):  # tensors and arrays of any shape
        return plain(value.tolist())
    return str(value)
