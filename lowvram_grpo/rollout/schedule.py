"""Continuous batching: a queue of requests, the rows that decode them, and the slots that hold their prompts.

Nothing here touches a tensor. Live rows are always 0 .. n - 1 and live slots 0 .. s - 1. A row whose request has
finished is given to the next one of the queue at once; where none is left (or no slot for its prompt is free), the last
live row moves into its place, so that a step works on live rows only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Request(NamedTuple):
    """What a row decodes: completion number `completion` of prompt number `prompt`."""

    prompt: int
    completion: int


@dataclass
class ScheduleUpdate:
    """What the device must follow, in this order: moves, then prefills.

    Attributes:
        row_moves, slot_moves: (source, target) of what is copied.
        prefills: (slot, prompt).
        admitted: rows that begin a request.
    """

    row_moves: list[tuple[int, int]] = field(default_factory=list)
    slot_moves: list[tuple[int, int]] = field(default_factory=list)
    prefills: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)


def slots_for(rows: int, group: int, prompts: int, prompt_length: int = 0, length: int = 0) -> int:
    """How many prompts are held for `rows` rows: those of their groups, and two more, so that the next groups can begin
    while the last rows of others go on (one takes 5 to 15 % more steps on lengths with a long tail, three 2 % less).
    Never more than rows: each needs but one. Where prompts are long, no more than half as many tokens are held for that
    as the rows have room for, but one prompt always; `prompt_length` and `length` are those of the longest prompt and
    completion, 0 where that does not count."""
    if rows >= prompts * group:
        return prompts
    spare = max(1, min(2, rows * length // (2 * prompt_length))) if prompt_length and length else 2
    return min(prompts, rows, -(-rows // group) + spare)


def rows_within(
    rows: int, planned_group: int, group: int, prompts: int, prompt_length: int, length: int, *, states: bool = False
) -> int:
    """How many rows take no more of a cache with `group` completions a prompt than `rows` do with `planned_group`.

    Args:
        prompt_length, length: the longest prompt and completion, in tokens.
        states: prompts and rows have a state each, too, which is as large as any other.
    """

    def held(n: int, g: int, of: int) -> tuple[int, int]:
        slots = slots_for(n, g, of, prompt_length, length)
        return n * length + slots * prompt_length, states * (n + slots)

    budget = held(rows, planned_group, rows)
    fits = lambda n: all(need <= given for need, given in zip(held(n, group, prompts), budget))
    return next((n for n in range(rows, 1, -1) if fits(n)), 1)


class Scheduler:
    """Admits `group` requests of each prompt to at most `rows` rows.

    The longest prompts come first: they are the dearest, and at the end short ones fill the gaps. The requests of a
    prompt follow each other, so that it is prefilled once.

    Args:
        lengths: tokens of each prompt.
        longest: tokens of the longest completion, where long prompts are to be held sparingly.

    Attributes:
        running: the request of each live row.
        held: the prompt in each live slot.
    """

    def __init__(self, lengths: Sequence[int], group: int, rows: int | None = None, longest: int = 0):
        order = sorted(range(len(lengths)), key=lambda p: -lengths[p])
        self.waiting = deque(Request(p, g) for p in order for g in range(group))
        self.rows = min(rows or len(self.waiting), len(self.waiting))
        self.slots = slots_for(self.rows, group, len(lengths), max(lengths, default=0), longest)
        self.running: list[Request] = []
        self.held: list[int] = []
        self._unfinished = Counter({p: group for p in order})  # requests, a prompt

    @property
    def done(self) -> bool:
        return not self.running and not self.waiting

    def admit(self, finished: Iterable[int] = ()) -> ScheduleUpdate:
        """Free the rows that have finished, and give them to the requests that wait."""
        update = ScheduleUpdate()
        free_rows = sorted(finished)
        for row in free_rows:
            self._unfinished[self.running[row].prompt] -= 1
        free_slots = [slot for slot, prompt in enumerate(self.held) if not self._unfinished[prompt]]
        while self.waiting and (free_rows or len(self.running) < self.rows):
            request = self.waiting[0]
            if request.prompt not in self.held:
                slot = self._allocate(self.held, request.prompt, free_slots, self.slots)
                if slot is None:
                    break
                update.prefills.append((slot, request.prompt))
            update.admitted.append(self._allocate(self.running, self.waiting.popleft(), free_rows, self.rows))
        update.row_moves = _compact(self.running, free_rows)
        update.slot_moves = _compact(self.held, free_slots)
        return update

    @staticmethod
    def _allocate(places: list, value, free: list[int], limit: int) -> int | None:
        """Put `value` into a free place or a new one."""
        if free:
            place = free.pop(0)
            places[place] = value
        elif len(places) < limit:
            place = len(places)
            places.append(value)
        else:
            return None
        return place

    def members(self) -> list[list[int]]:
        """The rows of each live slot."""
        rows: dict[int, list[int]] = {prompt: [] for prompt in self.held}
        for row, request in enumerate(self.running):
            rows[request.prompt].append(row)
        return [rows[prompt] for prompt in self.held]


def _compact(places: list, free: list[int]) -> list[tuple[int, int]]:
    """Fill free places from the end, and shorten the list: what was moved, (from, to)."""
    moves = []
    gone = set(free)
    for gap in sorted(free):
        while places and len(places) - 1 in gone:
            places.pop()
        if gap >= len(places):
            break
        moves.append((len(places) - 1, gap))
        places[gap] = places.pop()
        gone.discard(gap)
    return moves
