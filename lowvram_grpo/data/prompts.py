"""The column that holds the prompts, what it holds, and the prompt of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.messages import as_messages, decoded, is_messages, written_out
from lowvram_grpo.errors import UserError, counted, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

PROMPT_COLUMNS = (
    "prompt", "question", "problem", "instruction", "query", "messages", "conversations", "conversation", "text",
)  # fmt: skip
# As plain text they hold whole dialogues, with the answers in them.
_OF_MESSAGES = {"messages", "conversations", "conversation"}


def find_prompt_column(dataset: Dataset, asked: str | None, tell: Callable[[str], None]) -> str:
    """The column that was asked for, else the first of `PROMPT_COLUMNS`; `tell` hears where there are several.

    Raises:
        UserError: there is none.
    """
    names = dataset.column_names
    if asked is None:
        first = dataset[0]
        usual = [name for name in PROMPT_COLUMNS if name in names]
        usual = [name for name in usual if name not in _OF_MESSAGES or _holds_messages(first[name])]
        if not usual:
            raise UserError(f"The data has no prompt column; name one with --prompt-column: {', '.join(names)}.")
        if len(usual) > 1:
            tell(f"the prompts are column {usual[0]!r}, not {' or '.join(map(repr, usual[1:]))} (--prompt-column).")
        return usual[0]
    if asked not in names:
        raise UserError(
            f"The data has no column {asked!r}{did_you_mean(asked, names)}; choose --prompt-column from: "
            f"{', '.join(names)}."
        )
    return asked


def _holds_messages(value: Any) -> bool:
    return written_out(value) if isinstance(value, str) else isinstance(value, list)


@dataclass
class PromptColumn:
    """What a prompt column holds.

    Attributes:
        conversational: messages rather than text.
        written_out: rows whose messages are text (JSON, Python).
        prefill: the column's name says prompt, so a last turn of the assistant's is meant to be gone on with.
        references: rows with such a turn where it is not.
        open_turns: rows with such a turn where it is.
        rows: all of them.
    """

    conversational: bool
    prefill: bool
    rows: int
    written_out: int = 0
    references: int = 0
    open_turns: int = 0

    def sentence(self, column: str) -> str:
        """What people should know of it; empty where nothing is special."""
        found = []
        if self.written_out:
            found.append(f"the messages in column {column!r} are written out as text; they are decoded.")
        if self.references:
            found.append(
                f"{self.references} of {counted(self.rows, 'conversation')} in column {column!r} "
                f"{'ends' if self.references == 1 else 'end'} with the assistant's turn, as data for SFT does: it is "
                "the reference, and no part of the prompt (a column that is named prompt keeps it, to be gone on with)."
            )
        if self.open_turns:
            found.append(
                f"{self.open_turns} of {counted(self.rows, 'conversation')} in column {column!r} "
                f"{'ends' if self.open_turns == 1 else 'end'} with the assistant's turn, which completions go on with; "
                "if it is the answer, rename the column to messages."
            )
        return " ".join(found)


def look_at(dataset: Dataset, column: str) -> PromptColumn:
    """What a column holds; a column of plain text is known by its first row.

    Raises:
        UserError: a conversation that is none.
    """
    kind = PromptColumn(False, "prompt" in column.lower(), len(dataset))
    for index, value in enumerate(dataset.select_columns(column)):
        value = value[column]
        if isinstance(value, str):
            if not written_out(value):
                if index == 0:
                    return kind
                continue
            kind.written_out += 1
        if index == 0:
            kind.conversational = isinstance(value, (str, list))
        messages = _usable(value, column, index)
        if isinstance(messages, list) and messages[-1]["role"] == "assistant":
            if kind.prefill:
                kind.open_turns += 1
            else:
                kind.references += 1
    return kind


def _usable(prompt: Any, column: str, index: int) -> str | list[dict[str, str]]:
    """The prompt itself, or its messages with role and content only."""
    where = f"Row {index} of column {column!r}"
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{where} is blank; drop such rows or name another --prompt-column.")
        if not written_out(prompt):
            return prompt
    elif not is_messages(prompt):
        raise UserError(
            f"{where} is {_shape(prompt)}, but a prompt must be text or a list of messages with role and content; drop "
            "such rows or name another --prompt-column."
        )
    try:
        return as_messages(decoded(prompt) if isinstance(prompt, str) else prompt)
    except ValueError as error:
        raise UserError(f"{where} {error}.") from error


def _shape(value: Any) -> str:
    if not value and not isinstance(value, (int, float)):
        return "empty"
    if isinstance(value, list) and isinstance(value[0], dict):
        return f"a list of {', '.join(map(repr, value[0]))}"
    return type(value).__name__


def prompt_and_last(value: Any, column: str, index: int, *, sft: bool) -> tuple[str | list[dict], str | None]:
    """The prompt of a row, and the assistant's last turn where that is none of it.

    Args:
        sft: such a turn is the reference, not the beginning of the completion.

    Raises:
        UserError: there is no usable prompt.
    """
    prompt = _usable(value, column, index)
    if not sft or isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return prompt, None
    if not any(message["role"] == "user" for message in prompt[:-1]):
        raise UserError(
            f"Row {index} of column {column!r} has no user's turn before the assistant's last one, which is the "
            "reference and leaves no prompt; drop such rows or name another --prompt-column."
        )
    return prompt[:-1], prompt[-1]["content"]
