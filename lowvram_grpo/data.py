"""Any dataset becomes a `prompt` column and whatever the rewards read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.errors import UserError, did_you_mean, one_line
from lowvram_grpo.templates import template as find_template

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "query", "text")
_READERS = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


# Loading -------------------------------------------------------------------------------------------------------------


def load(
    path: str, *, config: str | None = None, split: str | None = None, prefer: Sequence[str] = ("train",)
) -> Dataset:
    """Read a dataset.

    Args:
        path: a `save_to_disk` folder, a json/jsonl/csv/tsv/parquet file, a folder of such files, or a hub id.
        config: the dataset's configuration, for hub ids and folders that have several.
        split: a split or a slice of one, as `datasets` writes it (`train[:1000]`).
        prefer: which split to take where none is named: the first of these that is there, or the only one.

    Raises:
        UserError: nothing is there, it can't be read, it is empty, or it has no such split.
    """
    from datasets import DatasetDict

    found = _read(path, config)
    dataset = _pick_split(found if isinstance(found, DatasetDict) else DatasetDict(train=found), split, path, prefer)
    if not len(dataset):
        raise UserError(
            f"The dataset {path} is empty{f' in split {split!r}' if split else ''}; GRPO needs one prompt or more."
        )
    return dataset


def _read(path: str, config: str | None) -> Dataset | DatasetDict:
    from datasets import load_dataset, load_from_disk

    place = Path(path).expanduser()
    suffix = place.suffix.lower()
    try:
        if place.is_dir():
            saved = (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()
            return load_from_disk(str(place)) if saved else load_dataset(str(place), config)
        if place.is_file():
            if suffix not in _READERS:
                raise UserError(
                    f"The dataset {path} is a file of no known kind; give a {', '.join(k[1:] for k in _READERS)} file."
                )
            reader, options = _READERS[suffix]
            return load_dataset(reader, data_files={"train": [str(place)]}, **options)
        if suffix in _READERS or not _HUB_ID.fullmatch(path):
            raise UserError(
                f"The dataset {path} does not exist: no such file or folder, and it is no hub id (owner/name)."
            )
        return load_dataset(path, config)
    except UserError:
        raise
    # What `datasets` raises for a file of zero bytes, and for a saved split of no rows.
    except (StopIteration, IndexError) as error:
        raise UserError(
            f"The dataset {path} is empty, or one of its splits is; GRPO needs one prompt or more."
        ) from error
    except Exception as error:  # a dozen libraries read for us, each with errors of its own
        raise _unreadable(path, place, error) from error


def _unreadable(path: str, place: Path, error: Exception) -> UserError:
    from datasets.exceptions import DatasetNotFoundError

    reason = one_line(error.__cause__ or error)
    hint = "; choose one with --data-config" if "config name" in reason.lower() else ""
    if place.exists():
        return UserError(f"The dataset {path} can't be read: {reason}{hint}.")
    if isinstance(error, (DatasetNotFoundError, ConnectionError)):
        return UserError(
            f"The dataset {path} is neither a file nor a folder here, nor reachable on the hub ({reason}); "
            "check the name, give a local path, or, where the hub is blocked, set HF_ENDPOINT to a mirror."
        )
    return UserError(f"The dataset {path} can't be loaded from the hub: {reason}{hint}.")


def _pick_split(splits: DatasetDict, split: str | None, path: str, prefer: Sequence[str]) -> Dataset:
    from datasets import ReadInstruction, concatenate_datasets

    names = list(splits)
    if split is None:
        usual = next((name for name in prefer if name in splits), None)
        if usual is None and len(splits) > 1:
            raise UserError(
                f"The dataset {path} has no split {prefer[0]!r}; choose one of {', '.join(names)} with --split."
            )
        return splits[usual or names[0]]
    asked = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
    for name in asked:
        if name not in splits:
            raise UserError(
                f"The dataset {path} has no split {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}."
            )
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(splits[name]) for name in names})
    except (ValueError, AssertionError) as error:
        raise UserError(f"--split {split} can't be read ({error}); write it as train or train[:1000].") from error
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


# Preparing -----------------------------------------------------------------------------------------------------------


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a list of messages (`{"role": str, "content": str}`) rather than plain text."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict) and "role" in prompt[0]


def prepare(
    dataset: Dataset,
    *,
    template: str | None,
    prompt_column: str | None,
    answer_column: str | None,
    system_prompt: str | None,
    few_shot: list[dict[str, str]] | None,
) -> Dataset:
    """A dataset as the trainer and the rewards read it.

    Plain text stays text unless there is a system prompt or an example to put before it; then it becomes a user turn.
    Prompts that are conversations get the system prompt where they have none, and the examples where they have a
    single turn. Conversations keep the roles and contents of their messages.

    Args:
        template: a name of `templates.TEMPLATES`.
        prompt_column: by default the first of `PROMPT_COLUMNS` present.
        answer_column: by default the first of the template's `answer_columns` present.
        system_prompt: used instead of the template's; `""` means none.
        few_shot: `{"prompt": str, "completion": str}` each, used instead of the template's; `[]` means none.

    Returns:
        the dataset with `prompt` (str, or a list of messages); with an answer column also `answer` (str or None; a
        `completion` column that it came from goes, since rewards receive the model's completions under that name);
        and where the template can format the row's answer, `reference_completion` (str or None), unless the dataset
        brings that column itself. All other columns are kept.

    Raises:
        UserError: a column is missing, or a row has no usable prompt.
    """
    from datasets import Features, Value

    form = find_template(template) if template else None
    source = _prompt_column(dataset, prompt_column)
    answer = _answer_column(dataset, answer_column, form.answer_columns if form else ())
    before, shots = opening_turns(template, system_prompt, few_shot)
    conversational = bool(before or shots) or isinstance(dataset[0][source], list)
    have = {*dataset.column_names, *(["answer"] if answer else [])}
    makes_reference = form and {*form.reference_needs} <= have and "reference_completion" not in have

    def columns(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt = _checked(row[source], source, index)
        if not conversational and not isinstance(prompt, str):
            raise UserError(
                f"Row {index} of column {source!r} is a conversation, but row 0 is text; use one kind only."
            )
        new = {"prompt": _with_turns(prompt, before, shots) if conversational else prompt}
        if answer:
            new["answer"] = None if row[answer] is None else str(row[answer])
        if makes_reference:
            new["reference_completion"] = form.reference({**row, **new})
        return new

    text = Value("string")
    features = {**dataset.features, "prompt": [{"role": text, "content": text}] if conversational else text}
    if answer:
        features["answer"] = text
    if makes_reference:
        features["reference_completion"] = text
    dropped = [answer] if answer == "completion" else []
    for name in dropped:
        del features[name]
    # In memory: a cache on disk would be keyed on names of our functions, not their code, and outlive an upgrade.
    return dataset.map(
        columns,
        with_indices=True,
        remove_columns=dropped,
        features=Features(features),
        keep_in_memory=True,
        desc="Preparing prompts",
    )


def opening_turns(
    template: str | None, system_prompt: str | None, few_shot: list[dict[str, str]] | None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The messages that stand before a person's first: the system turn, and the worked examples; each may be empty.

    The arguments are those of `prepare`.
    """
    form = find_template(template) if template else None
    if form and system_prompt is None:
        system_prompt = form.system_prompt
    if form and few_shot is None:
        few_shot = list(form.few_shot)
    before = [{"role": "system", "content": system_prompt}] if system_prompt else []
    shots = [
        {"role": role, "content": shot[key]}
        for shot in few_shot or []
        for role, key in (("user", "prompt"), ("assistant", "completion"))
    ]
    return before, shots


def _prompt_column(dataset: Dataset, asked: str | None) -> str:
    names = dataset.column_names
    if asked is None:
        found = next((name for name in PROMPT_COLUMNS if name in names), None)
        if found is None:
            raise UserError(f"The data has no prompt column; name one with --prompt-column: {', '.join(names)}.")
        return found
    return _column(dataset, asked, "--prompt-column")


def _answer_column(dataset: Dataset, asked: str | None, usual: Sequence[str]) -> str | None:
    if asked is None:
        return next((name for name in usual if name in dataset.column_names), None)
    return _column(dataset, asked, "--answer-column")


def _column(dataset: Dataset, name: str, flag: str) -> str:
    names = dataset.column_names
    if name not in names:
        raise UserError(
            f"The data has no column {name!r}{did_you_mean(name, names)}; choose {flag} from: {', '.join(names)}."
        )
    return name


def _checked(prompt: Any, column: str, index: int) -> str | list[dict[str, str]]:
    """The prompt itself, or its messages with role and content only."""
    where = f"Row {index} of column {column!r}"
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{where} is blank; drop such rows or name another --prompt-column.")
        return prompt
    if not is_conversational(prompt):
        raise UserError(
            f"{where} is {'empty' if prompt is None else type(prompt).__name__}, but a prompt must be text or a list "
            "of messages with role and content; drop such rows or name another --prompt-column."
        )
    messages = [{"role": m.get("role"), "content": m.get("content")} for m in prompt]
    if not all(isinstance(value, str) for m in messages for value in m.values()):
        raise UserError(f"{where} has a message whose role or content is not text; only text messages are supported.")
    return messages


def _with_turns(prompt: str | list[dict[str, str]], system: list[dict], shots: list[dict]) -> list[dict]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt[0]["role"] == "system":
        system, prompt = prompt[:1], prompt[1:]
    return [*system, *(shots if len(prompt) == 1 else []), *prompt]


def check_dataset(dataset: Any, name: str) -> None:
    """Whether GRPOTrainer can use a dataset that a script made.

    Raises:
        UserError: it is missing, has no length, is empty, or has no `prompt` column (those found are listed).
    """
    if dataset is None:
        raise UserError(f"{name} is missing; GRPO needs a dataset with a `prompt` column.")
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]")
        return
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(f"{name} has no length (it is a {type(dataset).__name__}); pass a map-style dataset.")
    if len(dataset) == 0:
        raise UserError(f"{name} is empty; GRPO needs at least one prompt.")
    if "prompt" not in dataset[0]:
        found = ", ".join(dataset[0])
        raise UserError(
            f"{name} has no `prompt` column (columns found: {found}); rename the column that holds the prompts."
        )
