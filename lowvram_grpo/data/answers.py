"""A row's reference answer as text, out of whatever its column holds. Never the text of a Python object: a reward that
looks for the last number in `{'ground_truth': '3', 'index': 103}` takes the index for the answer."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.messages import is_messages, joined
from lowvram_grpo.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

# What data calls the one answer among the fields of a struct: verl's reward_model, SQuAD's answers, TriviaQA's answer.
_FIELDS = (
    "ground_truth", "answer", "final_answer", "solution", "target", "gold", "gold_answer", "reference",
    "reference_answer", "expected_answer", "correct_answer", "label", "value", "text",
)  # fmt: skip
_FLAG = "--answer-column"


class Answer:
    """Where the answers of a dataset stand.

    Args:
        column: its name, or a field of a struct as `column.field`.

    Attributes:
        column: of the dataset.
        notice: a sentence for people where something else than the column itself was taken; else empty.

    Raises:
        UserError: no such column or field, or a struct of which no one field is the answer.
    """

    def __init__(self, dataset: Dataset, column: str):
        self.column, *fields = [column] if column in dataset.column_names else column.split(".")
        names = dataset.column_names
        if self.column not in names:
            raise UserError(
                f"The data has no column {self.column!r}{did_you_mean(self.column, names)}; choose {_FLAG} from: "
                f"{', '.join(names)}."
            )
        self.path: list[str] = []
        feature: Any = dataset.features[self.column]
        for field in fields:
            feature = self._entered(feature, field)
        while isinstance(feature, dict):
            feature = self._entered(feature, self._only(list(feature)))
        self._name_of: Callable[[int], str] | None = getattr(feature, "int2str", None)
        self.notice = ""
        if self.path and self._shown() != column:
            self.notice = (
                f"the answers are field {self.path[-1]!r} of column {self.column!r} ({_FLAG} {self._shown()})."
            )
        elif self._name_of:
            self.notice = f"the answers are the names of the classes in column {self.column!r}, not their numbers."

    def of(self, row: dict[str, Any], index: int) -> str | None:
        """The answer of a row as text, None where it has none.

        Raises:
            UserError: it is more than one value.
        """
        value = row[self.column]
        for name in self.path:
            value = None if value is None else value.get(name)
        try:
            return self._text(value)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"Row {index}: the answer in column {self._shown()!r} {error}.") from error

    def _text(self, value: Any) -> str | None:
        if value is None or isinstance(value, str):
            return value
        if self._name_of and isinstance(value, int):
            return self._name_of(value) if value >= 0 else None
        if isinstance(value, float):
            # A column of whole numbers in which one is missing is read as floats.
            return None if math.isnan(value) else str(int(value)) if value.is_integer() else repr(value)
        if isinstance(value, (bool, int, decimal.Decimal, datetime.date, datetime.time)):
            return str(value)
        if isinstance(value, dict):
            return self._text(value[self._only(list(value))])
        if isinstance(value, list):
            return self._of_list(value)
        raise ValueError(f"is {type(value).__name__}, not text or a number; name another with {_FLAG}")

    def _of_list(self, values: list) -> str | None:
        if is_messages(values):
            turns = [message for message in values if message.get("role", message.get("from")) in ("assistant", "gpt")]
            values = [joined(turn.get("content", turn.get("value"))) for turn in turns or values]
        texts = {self._text(value) for value in values} - {None}
        if len(texts) > 1:
            raise ValueError(
                f"is a list of {len(texts)} different values, and one answer is compared; name a column of one with "
                f"{_FLAG}, or write a reward that reads them all"
            )
        return texts.pop() if texts else None

    def _only(self, fields: list[str]) -> str:
        known = fields if len(fields) == 1 else [name for name in _FIELDS if name in fields]
        if len(known) == 1:
            return known[0]
        places = ", ".join(f"{self._shown()}.{name}" for name in fields)
        which = "no field of a name that answers have" if not known else f"{' and '.join(known)} among its fields"
        raise UserError(
            f"The answer column {self._shown()!r} holds a struct with {which}; name the one that holds the answer: "
            f"{_FLAG} with one of {places}."
        )

    def _entered(self, feature: Any, field: str) -> Any:
        if not isinstance(feature, dict) or field not in feature:
            found = ", ".join(feature) if isinstance(feature, dict) else "none"
            raise UserError(f"The answer column {self._shown()!r} has no field {field!r}; its fields: {found}.")
        self.path.append(field)
        return feature[field]

    def _shown(self) -> str:
        return ".".join([self.column, *self.path])
