"""Several datasets as one: each is read and prepared by itself, and its rows remember where they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.mixed_stream import MixedStream
from lowvram_grpo.data.streams import LOOKED_AT, first_rows, is_stream
from lowvram_grpo.errors import UserError, counted, did_you_mean, one_line

if TYPE_CHECKING:
    from datasets import Dataset

# As verl calls it. Data that has such a column keeps it.
SOURCE_COLUMN = "data_source"
_MIXTURE = ("datasets", "seed", "test_split_size")
_DATASET = ("id", "config", "split", "columns", "weight")


@dataclass(frozen=True)
class Part:
    """Data, and what may be looked at in its place.

    Attributes:
        name: what people and metrics call it.
        data: a Dataset, or a stream.
        first: the data itself, or the first rows of a stream.
    """

    name: str
    data: Any
    first: Dataset

    @classmethod
    def of(cls, name: str, data: Any) -> Part:
        """Raises:
        UserError: it is a stream without a row, or of rows that make no table."""
        if not is_stream(data):
            return cls(name, data, data)
        from datasets import Dataset

        rows = first_rows(data)
        if not rows:
            raise UserError(f"The dataset {name} is empty; GRPO needs one prompt or more.")
        try:
            return cls(name, data, Dataset.from_list(rows, features=getattr(data, "features", None)))
        except Exception as error:  # Arrow's, of many kinds
            raise UserError(
                f"The rows of {name} make no table ({one_line(error)}); give each column one type."
            ) from error

    @property
    def streams(self) -> bool:
        return is_stream(self.data)

    @property
    def count(self) -> str:
        """How many prompts it has, in words."""
        return "a stream of prompts" if self.streams else counted(len(self.data), "prompt")


@dataclass(frozen=True)
class Source:
    """A dataset of Open R1's `dataset_mixture`: `share` of its rows are taken, all if None."""

    place: str
    config: str | None = None
    split: str | None = None
    columns: tuple[str, ...] | None = None
    share: float | None = None


@dataclass(frozen=True)
class Mixture:
    """Open R1's `dataset_mixture`: rows of all sources, shuffled by `seed`, of which `test` are kept for evaluation (a
    share, or a number of rows)."""

    sources: tuple[Source, ...]
    seed: int = 0
    test: float | int | None = None


def read_mixture(table: Mapping[str, Any]) -> Mixture:
    """Raises:
    UserError: it is none."""
    _check_keys(table, _MIXTURE, "dataset_mixture")
    listed = table.get("datasets")
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, Mapping) for entry in listed):
        raise UserError("dataset_mixture needs a list `datasets`, each with an `id`.")
    sources = tuple(_source(entry, number) for number, entry in enumerate(listed, 1))
    columns = [set(source.columns) for source in sources if source.columns]
    if any(each != columns[0] for each in columns):
        raise UserError(
            "The datasets of dataset_mixture take different columns; they become one, so name the same columns for all."
        )
    test, seed = table.get("test_split_size"), table.get("seed")
    if test is not None and not (_is_number(test) and (0 < test < 1 or (isinstance(test, int) and test >= 1))):
        raise UserError(f"test_split_size of dataset_mixture is {test!r}; give a share between 0 and 1, or rows.")
    if seed is not None and not isinstance(seed, int):
        raise UserError(f"seed of dataset_mixture is {seed!r}, and must be a whole number.")
    return Mixture(sources, seed or 0, test)


def _source(entry: Mapping[str, Any], number: int) -> Source:
    where = f"dataset {number} of dataset_mixture"
    _check_keys(entry, _DATASET, where)
    if not isinstance(entry.get("id"), str) or not entry["id"]:
        raise UserError(f"{where[0].upper()}{where[1:]} has no `id`; write its hub id, folder or file there.")
    share, columns = entry.get("weight"), entry.get("columns")
    if share is not None and not (_is_number(share) and 0 < share <= 1):
        raise UserError(
            f"weight of {entry['id']} in dataset_mixture is {share!r}; it is the share of its rows that is taken, "
            "above 0 and at most 1 (for shares of the mixture pass several --data with --data-weights)."
        )
    if columns is not None and not (isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
        raise UserError(f"columns of {entry['id']} in dataset_mixture must be a list of names.")
    return Source(entry["id"], entry.get("config"), entry.get("split"), tuple(columns) if columns else None, share)


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise UserError(f"{where} has no key {key!r}{did_you_mean(str(key), known)}; it takes {', '.join(known)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_weights(weights: Sequence[float], names: Sequence[str]) -> None:
    """Raises:
    UserError: they are not one positive number for each of several datasets."""
    if len(names) < 2:
        raise UserError("data_weights is for several datasets; pass --data more than once, or drop it.")
    if len(weights) != len(names):
        raise UserError(
            f"data_weights has {counted(len(weights), 'number')} for {counted(len(names), 'dataset')} "
            f"({', '.join(names)}); give one for each, as in --data-weights 0.7,0.3."
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(
            f"data_weights is {', '.join(map(str, weights))}; each must be above 0 (drop data you don't want)."
        )


def mixed(parts: Sequence[Part], weights: Sequence[float] | None, seed: int, tell: Callable[[str], None]) -> Part:
    """One of several prepared parts (`load.prepare`); a part alone stays what it is.

    Without weights every row is there once: streams take turns. With weights a part is drawn for each row, and smaller
    ones are repeated until the longest is through. Prompts of plain text become user turns where other parts have
    conversations; columns that are of several types are left out, those that a part lacks are None there.
    """
    if len(parts) == 1:
        return parts[0]
    chats = any(_of_messages(part) for part in parts)
    said = [part.name for part in parts if chats and not _of_messages(part)]
    if said:
        tell(f"the prompts of {', '.join(said)} become user turns, as other data of this run has conversations.")
    names = list(dict.fromkeys(name for part in parts for name in part.first.column_names))
    kinds = {name: [p.first.features[name] for p in parts if name in p.first.column_names] for name in names}
    split = [name for name in names if name != "prompt" and any(kind != kinds[name][0] for kind in _known(kinds[name]))]
    if split:
        tell(f"column{'s' * (len(split) > 1)} {', '.join(split)} differ{'s' * (len(split) == 1)} in type between the "
             "datasets, and no rewards get them.")  # fmt: skip
    types = {name: _known(kinds[name])[0] for name in names if name not in split}
    parts = [_aligned(part, types, chats) for part in parts]
    first = _joined([part.first for part in parts], weights, seed)
    name = " + ".join(part.name for part in parts)
    if not any(part.streams for part in parts):
        return Part(name, first, first)
    streams = [part.data if part.streams else part.data.to_iterable_dataset() for part in parts]
    return Part(name, MixedStream(streams, weights, seed), first)


def _known(kinds: list) -> list:
    """Without those of columns that hold nothing."""
    return [kind for kind in kinds if getattr(kind, "dtype", "") != "null"] or kinds


def _of_messages(part: Part) -> bool:
    return not hasattr(part.first.features["prompt"], "dtype") or not isinstance(part.first[0]["prompt"], str)


def _aligned(part: Part, types: dict[str, Any], chats: bool) -> Part:
    """The part with columns of these types, whether it has them or not, and that of its name."""
    from datasets import Features, Value

    text = Value("string")
    types = {**types, "prompt": [{"role": text, "content": text}] if chats else text, SOURCE_COLUMN: text}
    lacking: dict[str, Any] = {name: None for name in types if name not in part.first.column_names}
    if SOURCE_COLUMN not in part.first.column_names:
        lacking[SOURCE_COLUMN] = part.name

    def row(found: dict[str, Any]) -> dict[str, Any]:
        prompt = found["prompt"]
        new = dict(lacking)
        if chats and isinstance(prompt, str):
            new["prompt"] = [{"role": "user", "content": prompt}]
        return new

    other = [name for name in part.first.column_names if name not in types]
    first = part.first.map(row, remove_columns=other, features=Features(types), keep_in_memory=True, desc="Mixing data")
    data = part.data.map(row, remove_columns=other) if part.streams else first
    return Part(part.name, data, first)


def _joined(datasets: list[Dataset], weights: Sequence[float] | None, seed: int) -> Dataset:
    from datasets import concatenate_datasets, interleave_datasets

    if weights is None:
        return concatenate_datasets(datasets)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(datasets, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def shared_out(part: Part, seed: int, test: float | int | None) -> tuple[Part, Part | None]:
    """A mixture's rows, shuffled, and those of them that are kept for evaluation.

    Raises:
        UserError: nothing would be left to train on, or to evaluate.
    """
    rows = part.data.shuffle(seed=seed, keep_in_memory=True)
    if test is None:
        return Part(part.name, rows, rows), None
    try:
        both = rows.train_test_split(test_size=test, seed=seed)
    except ValueError as error:
        raise UserError(
            f"test_split_size {test} can't be taken of {counted(len(rows), 'row')}: {one_line(error)}."
        ) from error
    train, kept = both["train"], both["test"]
    return Part(part.name, train, train), Part(part.name, kept, kept)


def share_of(data: Dataset, source: Source, seed: int) -> Dataset:
    """The columns and the share of the rows that `source` takes, one row at least.

    Raises:
        UserError: there is no such column.
    """
    for name in source.columns or ():
        if name not in data.column_names:
            raise UserError(
                f"{source.place} of dataset_mixture has no column {name!r}{did_you_mean(name, data.column_names)}; it "
                f"has {', '.join(data.column_names)}."
            )
    data = data.select_columns(list(source.columns)) if source.columns else data
    if source.share is None:
        return data
    return data.shuffle(seed=seed).select(range(max(1, int(len(data) * source.share))))


def said_of_first(part: Part, tell: Callable[[str], None]) -> Callable[[str], None]:
    """`tell`, with what a sentence about a stream is based on."""
    if not part.streams:
        return tell
    return lambda sentence: tell(f"by the first {min(len(part.first), LOOKED_AT)} rows: {sentence}")
