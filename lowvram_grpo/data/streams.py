"""Data that has no length and no index, only an order: what can be known of it without reading it all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

if TYPE_CHECKING:
    from collections.abc import Sequence

# Rows that stand for all of a stream where something must be known of it before a run: what its columns hold, whether
# its prompts can be rendered, how long they are.
LOOKED_AT = 256


def is_stream(data: Any) -> bool:
    """Whether rows can only be iterated over: a `datasets.IterableDataset` or torch's."""
    datasets = sys.modules.get("datasets")  # who has made one has imported it
    return isinstance(data, IterableDataset) or (datasets is not None and isinstance(data, datasets.IterableDataset))


def first_rows(data: Any, count: int = LOOKED_AT) -> list[Any]:
    """The first rows of a stream; as it is iterated over anew each time, none is lost."""
    return list(islice(iter(data), count))


def looked_at(data: Any) -> Sequence[Any]:
    """What is looked at in place of data: the first rows of a stream, all other data itself."""
    return first_rows(data) if is_stream(data) else data


def opened_at(stream: Any, state: Any) -> Iterator[Any]:
    """The rows of a stream from the place that it called `state`. Whoever iterates over it next begins at its
    beginning: a stream of `datasets` would go on there each time, until another epoch."""
    stream.load_state_dict(state)
    rows = iter(stream)
    first = list(islice(rows, 1))
    if hasattr(stream, "_starting_state_dict"):
        stream.load_state_dict(None)
    yield from first
    yield from rows


def in_order_of_shards(data: Any, seed: int) -> Any:
    """The stream with its shards (files) in a random order, another one each pass, where it can do so."""
    shards = getattr(data, "num_shards", 1)
    # A buffer of one row shuffles none of them: rows are shuffled by whoever can go on in the middle of it.
    return data.shuffle(seed=seed, buffer_size=1) if shards > 1 and hasattr(data, "shuffle") else data
