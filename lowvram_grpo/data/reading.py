"""A dataset from a file, a folder or the hub. Text files are looked through first: what a reader would shift, rename or
decode wrongly without a word ends here."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.gym_tasks import is_gym, load_gym
from lowvram_grpo.data.mixture import Part
from lowvram_grpo.data.streams import is_stream
from lowvram_grpo.data.tabular import csv_options, json_mistake, unfolded
from lowvram_grpo.data.textfile import as_utf8, encoding_of
from lowvram_grpo.errors import UserError, did_you_mean, one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load(
    path: str, *, config: str | None = None, split: str | None = None, prefer: Sequence[str] = ("train",)
) -> Dataset:
    """Read a dataset.

    Args:
        path: a `save_to_disk` folder, a json/jsonl/csv/tsv/parquet file, a folder of such files, a hub id, or tasks of
            reasoning-gym (`gym_tasks`).
        config: the dataset's configuration, for hub ids and folders that have several.
        split: a split or a slice of one, as `datasets` writes it (`train[:1000]`).
        prefer: which split to take where none is named: the first of these that is there, or the only one.

    Raises:
        UserError: nothing is there, it can't be read, it is empty, or it has no such split.
    """
    from datasets import DatasetDict

    found = load_gym(path) if is_gym(path) else _read(path, config)
    dataset = _pick_split(found if isinstance(found, DatasetDict) else DatasetDict(train=found), split, path, prefer)
    if not len(dataset):
        raise UserError(
            f"The dataset {path} is empty{f' in split {split!r}' if split else ''}; GRPO needs one prompt or more."
        )
    return dataset


def load_stream(path: str, *, config: str | None = None, split: str | None = None) -> Part:
    """A dataset to be read while it is trained on: nothing is copied, and rows are looked at as they come. Arguments
    are those of `load`; of a split only `train[100:2000]` can be taken, no share of its rows.

    Raises:
        UserError: as `load`.
    """
    found = load_gym(path) if is_gym(path) else _read(path, config, stream=True)
    splits = found if isinstance(found, dict) else {"train": found}
    chosen = _pick_stream(splits, split, path)
    stream = chosen if is_stream(chosen) else chosen.to_iterable_dataset()
    with _reasons(path, Path(path).expanduser()):
        return Part.of(path, stream)


def _pick_stream(splits: dict[str, Any], split: str | None, path: str) -> Any:
    asked = re.fullmatch(r"\s*([^\s+\[(]+)\s*(?:\[\s*(\d*)\s*:\s*(\d*)\s*\])?\s*", split or "train")
    if not asked:
        raise UserError(
            f"--split {split} can't be taken of a stream, whose number of rows nobody knows; write one split, or rows "
            "of it as in train[100:2000], or drop --stream."
        )
    name, first, end = asked.groups()
    if split is None and name not in splits and len(splits) == 1:
        name = next(iter(splits))
    if name not in splits:
        raise UserError(
            f"The dataset {path} has no split {name!r}{did_you_mean(name, splits)}; choose one of {', '.join(splits)} "
            "with --split."
        )
    data = splits[name] if is_stream(splits[name]) else splits[name].to_iterable_dataset()
    data = data.skip(int(first)) if first else data
    return data.take(int(end) - int(first or 0)) if end else data


def _read(path: str, config: str | None, *, stream: bool = False) -> Dataset | DatasetDict:
    from datasets import load_dataset, load_from_disk

    place = Path(path).expanduser()
    suffix = place.suffix.lower()
    streaming = {"streaming": True} if stream else {}
    with _reasons(path, place):
        if place.is_dir():
            if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
                return load_from_disk(str(place))
            for file in sorted(place.rglob("*")):
                if not any(part.startswith((".", "__")) for part in file.relative_to(place).parts):
                    _check_in_folder(file, path, whole=not stream)
            return load_dataset(str(place), config, **streaming)
        if place.is_file():
            if suffix not in _READERS:
                raise UserError(
                    f"The dataset {path} is a file of no known kind; give a {', '.join(k[1:] for k in _READERS)} file."
                )
            return (_stream_file if stream else _read_file)(place, _READERS[suffix], path)
        if suffix in _READERS or not _HUB_ID.fullmatch(path):
            raise UserError(
                f"The dataset {path} does not exist: no such file or folder, and it is no hub id (owner/name)."
            )
        return load_dataset(path, config, **streaming)


def _stream_file(place: Path, reader: str, path: str) -> Any:
    from datasets import load_dataset

    what = f"The dataset {path}"
    options = {}
    if reader != "parquet":
        _check_utf8(place, what)
        options = csv_options(place, what, whole=False) if reader == "csv" else {}
    return load_dataset(reader, data_files={"train": [str(place)]}, streaming=True, **options)


def _check_utf8(file: Path, what: str) -> None:
    """By its first bytes: the rest comes while it is trained on.

    Raises:
        UserError: it is in another encoding that says so, or is empty.
    """
    with open(file, "rb") as opened:
        beginning = opened.read(4)
    if not beginning:
        raise UserError(f"{what} is empty; GRPO needs one prompt or more.")
    if encoding_of(beginning) not in ("utf-8", "utf-8-sig"):
        raise UserError(f"{what} is UTF-16 text, and only UTF-8 can be streamed; save it as UTF-8, or drop --stream.")


def _read_file(place: Path, reader: str, path: str) -> Dataset | DatasetDict:
    from datasets import load_dataset

    what = f"The dataset {path}"
    if reader == "parquet":
        return load_dataset(reader, data_files={"train": [str(place)]})
    with as_utf8(place, what) as file:
        options = csv_options(file, what) if reader == "csv" else {}
        try:
            found = load_dataset(reader, data_files={"train": [str(file)]}, **options)
        except Exception as error:
            mistake = json_mistake(file) if reader == "json" and not _cache_mistake(error) else ""
            if mistake:
                raise UserError(f"{what} can't be read: {mistake}.") from error
            raise
        return unfolded(found) if place.suffix.lower() == ".json" else found


def _check_in_folder(file: Path, path: str, *, whole: bool) -> None:
    """A text file of a folder, which `datasets` opens by itself.

    Raises:
        UserError: it would read it wrongly.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader not in ("json", "csv") or not file.is_file():
        return
    what = f"The file {file.name} of the dataset {path}"
    if not whole:
        _check_utf8(file, what)
    with contextlib.nullcontext(file) if not whole else as_utf8(file, what) as same:
        if same != file:
            raise UserError(f"{what} is UTF-16 text, and in a folder only UTF-8 is read; save it as UTF-8.")
        if reader == "csv" and csv_options(file, what, whole=whole)["sep"] != (
            "," if file.suffix.lower() == ".csv" else "\t"
        ):
            raise UserError(f"{what} is separated by other signs than its name says; pass the file itself as --data.")


@contextlib.contextmanager
def _reasons(path: str, place: Path) -> Iterator[None]:
    """What goes wrong while a dataset is read, in one sentence."""
    try:
        yield
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

    if cache := _cache_mistake(error):
        return UserError(cache)
    if "corresponds to no data" in str(error):  # a header, or blank lines, and no row
        return UserError(f"The dataset {path} is empty: it has no row; GRPO needs one prompt or more.")
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


def _cache_mistake(error: BaseException | None) -> str:
    """A sentence where the folder that `datasets` copies into is what failed, else an empty string."""
    import datasets

    cache = os.path.abspath(os.path.expanduser(str(datasets.config.HF_DATASETS_CACHE)))
    while error is not None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
            unnamed = error.filename is None and not _writable(cache)
            if full or unnamed or _in_cache(error.filename, cache):
                reason = error.strerror or one_line(error)
                return (
                    f"The cache folder {cache} can't be written ({reason}), and data is copied there to be read; set "
                    "HF_DATASETS_CACHE (or HF_HOME) to a folder that can be, with room for the data."
                )
        error = error.__cause__ or error.__context__
    return ""


def _in_cache(filename: Any, cache: str) -> bool:
    """Whether a failed path lies in the cache, or is a parent that could not be made for it."""
    if not isinstance(filename, (str, os.PathLike)):
        return False
    failed = os.path.abspath(str(filename))
    return failed.startswith(cache + os.sep) or cache == failed or cache.startswith(failed.rstrip(os.sep) + os.sep)


def _writable(folder: str) -> bool:
    """Whether files could be made in `folder`, or in the nearest parent that is there."""
    while not os.path.exists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _pick_split(splits: DatasetDict, split: str | None, path: str, prefer: Sequence[str]) -> Dataset:
    from datasets import NamedSplit, ReadInstruction, concatenate_datasets

    names = list(splits)
    if split is None:
        usual = next((name for name in prefer if name in splits), None)
        if usual is None and len(splits) > 1:
            raise UserError(
                f"The dataset {path} has no split {prefer[0]!r}; choose one of {', '.join(names)} with --split."
            )
        name = usual or names[0]
        # With its name, which a saved dataset has forgotten.
        return concatenate_datasets([splits[name]], split=splits[name].split or NamedSplit(name))
    asked = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
    for name in asked:
        if name not in splits:
            instead = f", as in {split.replace(name, names[0])!r}" if split != name else ""
            raise UserError(
                f"The dataset {path} has no split {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}"
                f"{instead}."
            )
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(splits[name]) for name in names})
    except (ValueError, AssertionError) as error:
        raise UserError(f"--split {split} can't be read ({error}); write it as train or train[:1000].") from error
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])
