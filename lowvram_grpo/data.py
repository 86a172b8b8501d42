"""Any dataset to a `prompt` column, plus whatever the rewards read; prompts to token ids."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_grpo.errors import UserError
from lowvram_grpo.templates import Template, find

if TYPE_CHECKING:
    from datasets import Dataset

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "query", "text")
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_BATCH = 512


class LengthReport(NamedTuple):
    """Prompt lengths in tokens: the longest before any cut, and how many of `counted` (of `total`) prompts are cut."""

    longest: int
    cut: int
    counted: int
    total: int


def is_conversational(prompt: Any) -> bool:
    """A list of {role, content} messages rather than a string."""
    return not isinstance(prompt, str)


def load(path: str, *, config: str | None = None, split: str | None = None) -> Dataset:
    """A `save_to_disk` folder, a json/jsonl/csv/parquet file, a folder of such files, or a hub id.

    Args:
        config: configuration of a hub dataset.
        split: default `train`, or the only one there is.

    Raises:
        UserError: nothing there, not readable, no such split, or no rows.
    """
    import datasets

    place = Path(path)
    try:
        if place.is_dir() and any((place / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(path)
        elif place.is_file():
            found = _read_files(path, [place])
        elif place.is_dir():
            found = _read_files(path, sorted(p for p in place.iterdir() if p.suffix in _READERS))
        else:
            found = datasets.load_dataset(path, config)
    except UserError:
        raise
    except Exception as error:
        raise _explain(path, error) from error
    data = _pick(found, split, path)
    if len(data) == 0:
        raise UserError(f"The data {path!r} has no rows; GRPO needs at least one prompt.")
    return data


def _read_files(path: str, files: list[Path]) -> Dataset:
    import datasets

    kinds = {_READERS.get(file.suffix) for file in files}
    if not files or len(kinds) != 1 or None in kinds:
        raise UserError(
            f"{path!r} is not a dataset: give a save_to_disk folder, or {', '.join(_READERS)} files of one kind."
        )
    if all(file.stat().st_size == 0 for file in files):
        raise UserError(f"The data {path!r} has no rows; GRPO needs at least one prompt.")
    return datasets.load_dataset(kinds.pop(), data_files=[str(file) for file in files], split="train")


def _explain(path: str, error: Exception) -> UserError:
    if os.path.exists(path):
        reason = str(error).strip().splitlines()
        return UserError(f"The data {path!r} cannot be read: {reason[0] if reason else type(error).__name__}")
    return UserError(
        f"The data {path!r} is neither a file nor a folder here, nor reachable on the hub; check the path, or set "
        "HF_ENDPOINT to a mirror."
    )


def _pick(found: Any, split: str | None, path: str) -> Dataset:
    if not isinstance(found, Mapping):
        if split not in (None, "train") and not hasattr(found, "keys"):
            raise UserError(f"The data {path!r} has no splits, so there is no {split!r}; drop --split.")
        return found
    if split is None and len(found) == 1:
        split = next(iter(found))
    split = split or "train"
    if split not in found:
        raise UserError(f"The data {path!r} has no split {split!r}; splits found: {', '.join(found)}.")
    return found[split]


def prepare(
    dataset: Dataset,
    *,
    template: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    few_shot: Sequence[Mapping[str, str]] | None = None,
) -> Dataset:
    """Rows with `prompt` (a string, or messages) and every other column; `answer` where the data has references, and
    `reference_completion` where the template knows how to write one.

    A string prompt becomes a conversation as soon as there is a template, a system prompt or a few-shot turn. A column
    named `completion` becomes `answer` if it is the reference, for rewards get the model's completions under that name.

    Raises:
        UserError: a column that is not there (those found are listed), or a row that is neither text nor messages.
    """
    shape = find(template) if template else None
    source = _prompt_column(dataset, prompt_column)
    answers = _answer_column(dataset, answer_column, shape, source)
    system = system_prompt if system_prompt is not None else (shape.system_prompt if shape else None)
    turns = (
        [(t["prompt"], t["completion"]) for t in few_shot]
        if few_shot is not None
        else (shape.few_shot if shape else ())
    )

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        made = {"prompt": _prompt(row[source], index, source, system, turns, conversation=shape is not None)}
        if answers is not None:
            made["answer"] = (
                row[answers] if isinstance(row[answers], str) or row[answers] is None else str(row[answers])
            )
        if shape is not None and answers is not None:
            made["reference_completion"] = shape.reference({**row, **made})
        return made

    dropped = {source} | ({answers} if answers == "completion" else set())
    return dataset.map(
        convert,
        with_indices=True,
        remove_columns=[c for c in dropped if c in dataset.column_names],
        load_from_cache_file=False,
    )


def _prompt_column(dataset: Dataset, wanted: str | None) -> str:
    found = ", ".join(dataset.column_names)
    if wanted is not None:
        if wanted not in dataset.column_names:
            raise UserError(
                f"The data has no column {wanted!r} (columns found: {found}); name one with --prompt-column."
            )
        return wanted
    for name in PROMPT_COLUMNS:
        if name in dataset.column_names:
            return name
    raise UserError(f"The data has no prompt column (columns found: {found}); name it with --prompt-column.")


def _answer_column(dataset: Dataset, wanted: str | None, shape: Template | None, source: str) -> str | None:
    if wanted is not None:
        if wanted not in dataset.column_names:
            found = ", ".join(dataset.column_names)
            raise UserError(
                f"The data has no column {wanted!r} (columns found: {found}); name one with --answer-column."
            )
        return wanted
    candidates = shape.answer_columns if shape else ("answer",)
    return next((name for name in candidates if name in dataset.column_names and name != source), None)


def _prompt(value: Any, index: int, column: str, system: str | None, turns, *, conversation: bool):
    if isinstance(value, str) and value.strip():
        if not (conversation or system or turns):
            return value
        messages = [{"role": "user", "content": value}]
    elif (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    ):
        messages = [{"role": m["role"], "content": m["content"]} for m in value]
    else:
        raise UserError(f"Row {index} of column {column!r} is neither text nor a list of messages; remove or mend it.")
    if turns and not any(m["role"] == "assistant" for m in messages):
        at = 1 if messages[0]["role"] == "system" else 0
        shown = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
        messages[at:at] = shown
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def encode_prompts(
    tokenizer,
    prompts: Sequence,
    *,
    max_prompt_length: int | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[list[int]], int]:
    """Token ids of each prompt and how many were cut on the left to `max_prompt_length`.

    Raises:
        UserError: messages, but the tokenizer has no chat template.
    """
    texts = [_as_text(tokenizer, prompt, chat_template_kwargs or {}) for prompt in prompts]
    plain = [not is_conversational(prompt) for prompt in prompts]
    ids = []
    for text, add_special in zip(texts, plain):
        row = tokenizer(text, add_special_tokens=add_special)["input_ids"]
        # A tokenizer that closes every text with an end token would make the model continue after the end.
        if (
            add_special
            and len(row) > 1
            and row[-1] == tokenizer.eos_token_id
            and not text.endswith(tokenizer.eos_token)
        ):
            row = row[:-1]
        ids.append(row or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id])
    if max_prompt_length is None:
        return ids, 0
    return [row[-max_prompt_length:] for row in ids], sum(len(row) > max_prompt_length for row in ids)


def _as_text(tokenizer, prompt: Any, kwargs: Mapping[str, Any]) -> str:
    if not is_conversational(prompt):
        return prompt
    if not tokenizer.chat_template:
        raise UserError(
            "The prompts are conversations, but the tokenizer has no chat template (a base model); pass "
            "--chat-template plain or a .jinja file, or use plain-text prompts."
        )
    unfinished = prompt[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not unfinished, continue_final_message=unfinished, **kwargs
    )


def prompt_length_report(
    tokenizer,
    dataset: Dataset,
    *,
    max_prompt_length: int | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    limit: int = 20_000,
) -> LengthReport:
    """Lengths of the first `limit` prompts."""
    total, longest, cut = len(dataset), 0, 0
    for prompts in _batches(dataset, min(total, limit)):
        ids, _ = encode_prompts(tokenizer, prompts, max_prompt_length=None, chat_template_kwargs=chat_template_kwargs)
        lengths = [len(row) for row in ids]
        longest = max(longest, *lengths)
        cut += sum(n > max_prompt_length for n in lengths) if max_prompt_length else 0
    return LengthReport(longest, cut, min(total, limit), total)


def _batches(dataset: Dataset, count: int) -> Iterator[list]:
    for first in range(0, count, _BATCH):
        yield dataset[first : min(first + _BATCH, count)]["prompt"]
