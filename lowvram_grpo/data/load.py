"""Any dataset becomes a `prompt` column and whatever the rewards read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.answers import Answer
from lowvram_grpo.data.messages import is_conversational, written_out
from lowvram_grpo.data.prompts import PROMPT_COLUMNS, find_prompt_column, look_at, prompt_and_last
from lowvram_grpo.data.reading import load
from lowvram_grpo.data.streams import LOOKED_AT, first_rows, is_stream
from lowvram_grpo.data.templates import template as find_template
from lowvram_grpo.errors import UserError, WrongType

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

__all__ = ["PROMPT_COLUMNS", "check_dataset", "is_conversational", "load", "opening_turns", "prepare"]

_REFERENCE = "reference_completion"
SYSTEM_COLUMNS = ("system_prompt", "system")


def prepare(
    dataset: Dataset,
    *,
    template: str | None,
    prompt_column: str | None,
    answer_column: str | None,
    system_prompt: str | None,
    few_shot: list[dict[str, str]] | None,
    answer_columns: Sequence[str] = (),
    tell: Callable[[str], None] = lambda sentence: None,
) -> Dataset:
    """A dataset as the trainer and the rewards read it.

    Plain text stays text unless there is a system prompt or an example to put before it; then it becomes a user turn.
    Prompts that are conversations get the system prompt where they have none, and the examples where they have a
    single turn. Conversations keep the roles and contents of their messages; ShareGPT's form, content in text parts
    and messages that were written out as JSON or Python text become the usual one.

    A column `system_prompt` or `system` holds the system prompts of single rows; they go before the run's own.

    Conversations whose last turn is the assistant's are SFT data: that turn is the reference, and the prompt ends
    before it. Only where the column's name says prompt it is the beginning of the completion and stays.

    Args:
        template: a name of `templates.TEMPLATES`.
        prompt_column: by default the first of `PROMPT_COLUMNS` present.
        answer_column: by default the first of the template's `answer_columns` present; `column.field` for a struct's.
        system_prompt: used instead of the template's; `""` means none.
        few_shot: `{"prompt": str, "completion": str}` each, used instead of the template's; `[]` means none.
        answer_columns: where the answer is looked for by default in place of the template's columns.
        tell: hears what was decided about the data, a sentence each.

    Returns:
        the dataset with `prompt` (str, or a list of messages); with answers also `answer` (str or None; a
        `completion` column that it came from goes, since rewards receive the model's completions under that name);
        and where the template can format the row's answer, or there are last turns and no template,
        `reference_completion` (str or None), unless the dataset brings that column itself. All other columns are kept.

    Raises:
        UserError: a column is missing, a row has no usable prompt, or an answer is not one value.
    """
    return preparation(
        dataset,
        template=template,
        prompt_column=prompt_column,
        answer_column=answer_column,
        system_prompt=system_prompt,
        few_shot=few_shot,
        answer_columns=answer_columns,
        tell=tell,
    ).of(dataset)


@dataclass(frozen=True)
class Preparation:
    """What `prepare` makes of rows, decided by looking at some or all of them.

    Attributes:
        row: the new columns of a row, given its number.
        dropped: columns that go.
        features: types of the columns of prepared data.
    """

    row: Callable[[dict[str, Any], int], dict[str, Any]]
    dropped: list[str]
    features: Features

    def of(self, dataset: Dataset) -> Dataset:
        # In memory: a cache on disk would be keyed on names of our functions, not their code, and outlive an upgrade.
        return dataset.map(
            self.row,
            with_indices=True,
            remove_columns=self.dropped,
            features=self.features,
            keep_in_memory=True,
            desc="Preparing prompts",
        )

    def of_stream(self, stream: IterableDataset) -> IterableDataset:
        """Row by row, as they come; types are left to the rows, for what the first ones have need not be all."""
        return stream.map(self.row, with_indices=True, remove_columns=self.dropped)


def preparation(
    dataset: Dataset,
    *,
    template: str | None,
    prompt_column: str | None,
    answer_column: str | None,
    system_prompt: str | None,
    few_shot: list[dict[str, str]] | None,
    answer_columns: Sequence[str],
    tell: Callable[[str], None],
) -> Preparation:
    """The arguments, and what is raised, are those of `prepare`."""
    form = find_template(template) if template else None
    source = find_prompt_column(dataset, prompt_column, tell)
    answer = _answer(dataset, answer_column, answer_columns or (form.answer_columns if form else ()))
    before, shots = opening_turns(template, system_prompt, few_shot)
    kind = look_at(dataset, source)
    own_system = None if system_prompt == "" else _system_column(dataset, source)
    conversational = bool(before or shots or own_system) or kind.conversational
    last_is_answer = bool(kind.references) and answer is None and not {"answer", "solution"} & {*dataset.column_names}
    have = {*dataset.column_names, *(["answer"] if answer or last_is_answer else [])}
    formats_reference = form is not None and {*form.reference_needs} <= have and _REFERENCE not in have
    last_is_reference = bool(kind.references) and form is None and _REFERENCE not in have
    said = f"column {own_system!r} holds the system prompts of single rows, which go before the run's own "
    said = f"{said}(--system-prompt '' leaves both out)." if own_system else ""
    for sentence in (kind.sentence(source), answer.notice if answer else "", said):
        if sentence:
            tell(sentence)

    def columns(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt, last = prompt_and_last(row.get(source), source, index, sft=not kind.prefill)
        if not conversational and not isinstance(prompt, str):
            raise UserError(
                f"Row {index} of column {source!r} is a conversation, but row 0 is text; use one kind only."
            )
        system = [{"role": "system", "content": row[own_system]}] if own_system and row.get(own_system) else before
        new = {"prompt": _with_turns(prompt, system, shots) if conversational else prompt}
        if answer or last_is_answer:
            new["answer"] = answer.of(row, index) if answer else last
        if formats_reference:
            new[_REFERENCE] = form.reference({**row, **new})
        elif last_is_reference:
            new[_REFERENCE] = last
        return new

    texts = ["answer"] if answer or last_is_answer else []
    texts += [_REFERENCE] if formats_reference or last_is_reference else []
    dropped = [answer.column] if answer and answer.column == "completion" else []
    return Preparation(columns, dropped, _features(dataset, conversational, texts, dropped))


def _system_column(dataset: Dataset, prompts: str) -> str | None:
    """The column that has a system prompt for some of the first rows."""
    for name in SYSTEM_COLUMNS:
        if name in dataset.column_names and name != prompts:
            first = dataset.select_columns(name)[:LOOKED_AT][name]
            if any(isinstance(value, str) and value.strip() for value in first):
                return name
    return None


def _features(dataset: Dataset, conversational: bool, texts: Sequence[str], dropped: Sequence[str]) -> Features:
    """The types of a prepared dataset's columns: its own, `prompt`, and `texts`, without `dropped`."""
    from datasets import Features, Value

    text = Value("string")
    types = {**dataset.features, "prompt": [{"role": text, "content": text}] if conversational else text}
    types |= dict.fromkeys(texts, text)
    return Features({name: kind for name, kind in types.items() if name not in dropped})


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


def _answer(dataset: Dataset, asked: str | None, usual: Sequence[str]) -> Answer | None:
    column = asked or next((name for name in usual if name in dataset.column_names), None)
    return Answer(dataset, column) if column else None


def _with_turns(prompt: str | list[dict[str, str]], system: list[dict], shots: list[dict]) -> list[dict]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt[0]["role"] == "system":
        system, prompt = prompt[:1], prompt[1:]
    return [*system, *(shots if len(prompt) == 1 else []), *prompt]


def check_dataset(dataset: Any, name: str, *, several: bool = False) -> None:
    """Whether GRPOTrainer can use a dataset that a script made.

    Args:
        several: a dict of datasets will do as well.

    Raises:
        WrongType: it is several where one is wanted.
        UserError: it is missing, has no length, is empty, or has no `prompt` column
            (those found are listed) or none of prompts.
    """
    if dataset is None:
        raise UserError(f"`{name}` is required: GRPO needs a dataset with a `prompt` column.")
    if isinstance(dataset, dict):
        if not several:
            splits = ", ".join(map(str, dataset)) or "none"
            raise WrongType(
                f"`{name}` must be a `Dataset` or `IterableDataset`, and is a {type(dataset).__name__} of several "
                f"datasets ({splits}); pass one of them, as in data[{next(iter(dataset), 'train')!r}]."
            )
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]")
        return
    if is_stream(dataset):
        dataset = first_rows(dataset, 1)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise WrongType(
            f"`{name}` must be a `Dataset` or `IterableDataset`, and is a {type(dataset).__name__}; "
            "datasets.IterableDataset.from_generator makes one of a function that yields rows."
        )
    if len(dataset) == 0:
        raise UserError(f"{name} is empty; GRPO needs at least one prompt.")
    try:
        row = dataset[0]
    except (KeyError, TypeError, IndexError):  # a pandas table is indexed by its columns
        row = None
    if not isinstance(row, dict):
        raise UserError(
            f"{name} is a {type(dataset).__name__}, whose rows are not dicts; pass a dataset of rows, as "
            "datasets.Dataset.from_list or from_pandas makes."
        )
    if "prompt" not in row:
        found = ", ".join(row)
        raise UserError(
            f"{name} has no `prompt` column (columns found: {found}); rename the column that holds the prompts."
        )
    for column in ("image", "images"):
        if row.get(column):
            raise UserError(
                f"{name} has pictures in its `{column}` column, and only text is supported; drop the column "
                f"(dataset.remove_columns({column!r})) where the prompts make sense without it."
            )
    prompt = row["prompt"]
    if isinstance(prompt, str) and written_out(prompt):
        raise UserError(
            f"{name} holds messages that are written out as text in its `prompt` column; make lists of them first, "
            "with json.loads."
        )
    if not isinstance(prompt, str) and not is_conversational(prompt):
        raise UserError(
            f"{name} has a prompt that is {'empty' if prompt is None else type(prompt).__name__} in its first row; it "
            "must be text or a list of messages with role and content."
        )
