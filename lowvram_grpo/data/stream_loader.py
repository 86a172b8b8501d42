"""Batches of prompts from a stream, shuffled block by block, and the place to go on from.

A shuffle buffer that is refilled row by row can't be gone on with: what was in it is lost with the process. Here a
block of rows is read, permuted by (seed, pass, block) and used up before the next is taken, so that the place of a run
is a place in the stream and a number of rows behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lowvram_grpo.data.streams import in_order_of_shards, opened_at

# As many rows as the buffers of `datasets` hold by default.
BLOCK = 1000
_FILE = "stream.json"


@dataclass(frozen=True)
class Place:
    """Where in a stream the next batch begins.

    Attributes:
        epoch: passes over the stream that are complete.
        row: rows of this pass in front of the block.
        offset: rows of the permuted block that earlier batches have taken.
        state: what the stream calls the place where the block begins, as json has it; None where it names none.
        digest: of the block's rows; empty before it is read.
        length: rows of a whole pass; None before one is complete.
        served: steps that the batch here has been given to.
        size: rows that were asked for when the block was read; 0 before that.
    """

    epoch: int = 0
    row: int = 0
    offset: int = 0
    state: Any = None
    digest: str = ""
    length: int | None = None
    served: int = 0
    size: int = 0

    def save(self, folder: str | Path) -> None:
        (Path(folder) / _FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Place | None:
        """None where there is none, as in the checkpoints of other data."""
        try:
            return cls(**json.loads((Path(folder) / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class StreamLoader(DataLoader):
    """Yields lists of rows of one pass over a stream, each list as often as there are steps that share its rollout.

    Args:
        data: the stream; it is iterated over anew at each pass.
        prompts: rows of a batch; the last of a pass may have fewer.
        repeats: how often a batch is yielded.
        shuffle: permute the rows of each block, and the order of the stream's shards where it has several.
        tell: hears how a resumed run finds its place, and when the data begins anew.

    Attributes:
        given: batches of this pass so far.
    """

    def __init__(
        self,
        data: Any,
        *,
        prompts: int,
        repeats: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        tell: Callable[[str], None] = lambda sentence: None,
    ):
        super().__init__(data, batch_size=None, collate_fn=list)
        self.prompts, self.repeats, self.shuffle, self.seed, self.tell = prompts, repeats, shuffle, seed, tell
        self._stream = in_order_of_shards(data, seed) if shuffle else data
        self._block = BLOCK if shuffle else prompts
        self._start = self._place = Place()
        self._epoch = self.given = 0

    @property
    def place(self) -> Place:
        """Of the batch that comes next, or of the one that has steps left to serve."""
        return self._place

    @property
    def epoch(self) -> float:
        """Complete passes, and the part of this one that is done as soon as the length of a pass is known."""
        place = self._place
        part = (place.row + place.offset) / place.length if place.length else 0.0
        return place.epoch + min(part, 1.0)

    def go_on(self, place: Place) -> None:
        """Begin the pass of `place` there."""
        self._start = self._place = place
        self._epoch = place.epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[list]:
        self.given = 0
        start = self._start if self._start.epoch == self._epoch else Place(self._epoch, length=self._place.length)
        if start.epoch and not (start.row or start.offset):
            self.tell(f"the data has come to its end: pass {start.epoch + 1} over it begins.")
        blocks = self._blocks(start)
        at, rows = next(blocks, (start, []))
        batch, begun = [], at
        while rows:
            taken = rows[at.offset : at.offset + self.prompts - len(batch)]
            batch += taken
            at = replace(at, offset=at.offset + len(taken), served=0)
            if at.offset >= len(rows):
                # Before the last batch is given away: whoever goes on behind it has to know whether more will come.
                at, rows = next(blocks, (Place(self._epoch + 1, length=at.row + at.offset), []))
            if batch and (len(batch) == self.prompts or not rows):
                yield from self._served(batch, begun, at)
                batch, begun = [], at

    def _served(self, batch: list, begun: Place, then: Place) -> Iterator[list]:
        for served in range(begun.served + 1, self.repeats + 1):
            self.given += 1
            self._place = then if served == self.repeats else replace(begun, served=served)
            yield list(batch)

    # Blocks

    def _blocks(self, start: Place) -> Iterator[tuple[Place, list]]:
        """(its place, its rows in the order in which they are used) of each block from `start` on."""
        if callable(set_epoch := getattr(self._stream, "set_epoch", None)):
            set_epoch(start.epoch)
        rows, stream = self._found(start)
        place = replace(start, size=start.size or self._block)
        while rows:
            after = self._state()
            yield replace(place, digest=_digest(rows)), self._permuted(rows, place)
            place = Place(start.epoch, place.row + len(rows), state=after, length=start.length, size=self._block)
            rows = list(islice(stream, self._block))

    def _found(self, start: Place) -> tuple[list, Iterator]:
        """The rows of the block at `start`, and the stream behind them."""
        size = start.size or self._block
        found = self._by_state(start, size) if start.row and start.state is not None else None
        rows, stream = found or self._by_count(start, size)
        if start.digest and _digest(rows) != start.digest:
            self.tell(
                f"the data gives other rows than when the checkpoint was made: going on behind row "
                f"{start.row + start.offset} by count (a stream that is shuffled needs a seed)."
            )
        return rows, stream

    def _by_state(self, start: Place, size: int) -> tuple[list, Iterator] | None:
        """None where the stream does not find the block again: a shuffle buffer of its own is lost, for one."""
        with _quiet(), contextlib.suppress(Exception):  # any library's
            stream = opened_at(self._stream, start.state)
            rows = list(islice(stream, size))
            if _digest(rows) == start.digest:
                return rows, stream
        return None

    def _by_count(self, start: Place, size: int) -> tuple[list, Iterator]:
        if start.row:
            self.tell(f"finding the place in the data: its first {start.row} rows are read and passed over.")
        stream = iter(self._stream)
        for _ in islice(stream, start.row):
            pass
        return list(islice(stream, size)), stream

    def _state(self) -> Any:
        """What the stream calls the place where it stands; None where it has no word for it that json can hold."""
        if not (callable(getattr(self._stream, "state_dict", None)) and hasattr(self._stream, "load_state_dict")):
            return None
        try:
            state = self._stream.state_dict()
            return state if json.loads(json.dumps(state)) == state else None
        except Exception:  # any library's; the rows are counted as well
            return None

    def _permuted(self, rows: list, place: Place) -> list:
        if not self.shuffle:
            return rows
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place.epoch * 7919 + place.row) % 2**63)
        return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def _digest(rows: list) -> str:
    prompts = [row.get("prompt") if isinstance(row, dict) else row for row in rows]
    return hashlib.sha1(json.dumps(prompts, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` warns of every buffer, also of ours, of one row, which loses none."""
    logger = logging.getLogger("datasets.iterable_dataset")
    level, logger.level = logger.level, logging.ERROR
    try:
        yield
    finally:
        logger.level = level
