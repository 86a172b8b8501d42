"""Requests: everyone is served once, rows and slots are never more than there are, and nobody's data is overwritten."""

from __future__ import annotations

import random

import pytest

from lowvram_grpo.rollout.schedule import Request, Scheduler, rows_within, slots_for


def play(seed: int):
    """A random schedule on places that hold who was written there: yields it with them after each admission."""
    rng = random.Random(seed)
    group, rows = rng.randint(1, 5), rng.choice([None, 1, 2, 3, 4, 7])
    lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 6))]
    schedule = Scheduler(lengths, group, rows)
    row_data, slot_data = [None] * schedule.rows, [None] * schedule.slots
    chance, ended = rng.choice([0.1, 0.4, 0.9, 1.0]), []
    while True:
        changes = schedule.admit(ended)
        for source, target in changes.row_moves:
            row_data[target] = row_data[source]
        for source, target in changes.slot_moves:
            slot_data[target] = slot_data[source]
        for slot, prompt in changes.prefills:
            slot_data[slot] = prompt
        for row in changes.admitted:
            row_data[row] = schedule.running[row]
        yield schedule, lengths, group, row_data, slot_data, changes
        if schedule.done:
            return
        ended = [row for row in range(len(schedule.running)) if rng.random() < chance]


@pytest.mark.parametrize("block", range(8))
def test_rows_and_slots_hold_what_their_requests_say(block):
    for seed in range(block * 40, block * 40 + 40):
        served, prefilled = [], []
        everyone = set()
        for schedule, lengths, group, rows, slots, changes in play(seed):
            everyone = {Request(p, g) for p in range(len(lengths)) for g in range(group)}
            assert rows[: len(schedule.running)] == schedule.running and slots[: len(schedule.held)] == schedule.held
            assert len(set(schedule.held)) == len(schedule.held)
            assert [len(m) for m in schedule.members()] == [
                sum(request.prompt == p for request in schedule.running) for p in schedule.held
            ]
            assert sorted(row for m in schedule.members() for row in m) == list(range(len(schedule.running)))
            served += [schedule.running[row] for row in changes.admitted]
            prefilled += [prompt for _, prompt in changes.prefills]
        assert len(served) == len(everyone) and set(served) == everyone
        assert sorted(prefilled) == sorted({request.prompt for request in everyone})


def test_a_row_that_ends_is_taken_over_at_once():
    schedule = Scheduler([5] * 6, 2, rows=6)
    schedule.admit()
    changes = schedule.admit([1])
    assert changes.admitted == [1] and schedule.running[1] == Request(3, 0) and changes.prefills == [(3, 3)]
    assert not changes.row_moves and len(schedule.running) == 6
    assert schedule.admit([3]).admitted == [3]
    assert schedule.admit([1]).prefills == [(4, 4)]
    assert schedule.admit([5]).admitted == [5]
    # Prompts 0 to 4 all still have a completion that goes on, so prompt 5 waits for a slot, not for a wave.
    assert schedule.admit([1]).admitted == []
    assert schedule.admit([0]).prefills == [(0, 5)]


def test_the_longest_prompts_come_first():
    schedule = Scheduler([2, 9, 5], 2, rows=2)
    schedule.admit()
    assert schedule.held == [1]
    schedule.admit([0, 1])
    assert schedule.held == [2]


@pytest.mark.parametrize(
    "rows,group,prompts,slots", [(1, 8, 4, 1), (8, 8, 1, 1), (8, 8, 4, 3), (3, 8, 4, 3), (32, 8, 4, 4), (16, 8, 9, 4)]
)
def test_slots_for_the_rows_and_two_more_prompts(rows, group, prompts, slots):
    assert slots_for(rows, group, prompts) == slots


@pytest.mark.parametrize(
    "rows,prompt_length,length,slots",
    [(8, 12_288, 4_096, 2), (32, 12_288, 4_096, 6), (8, 512, 256, 3), (2, 8_192, 64, 2)],
)
def test_of_long_prompts_few_are_held_that_nobody_needs_yet(rows, prompt_length, length, slots):
    assert slots_for(rows, 8, 64, prompt_length, length) == slots
    assert Scheduler([prompt_length] * 64, 8, rows, length).slots == slots


def test_fewer_completions_a_prompt_take_fewer_rows_in_the_same_cache():
    tokens = lambda rows, group: rows * 30 + slots_for(rows, group, 64, 100, 30) * 100
    for rows in (1, 3, 16, 32):
        for group in (1, 2, 4):
            fewer = rows_within(rows, 8, group, 64, 100, 30)
            assert tokens(fewer, group) <= tokens(rows, 8) < tokens(fewer + 1, group) or fewer in (1, rows)
    assert rows_within(16, 8, 1, 64, 100, 30) < 8
    assert rows_within(16, 8, 1, 2, 100, 30) == 16  # there are but two prompts
    assert rows_within(16, 8, 1, 64, 1, 300) == 15
    # As many states as 16 rows and 4 prompts have: 10 rows of a prompt each.
    assert rows_within(16, 8, 1, 64, 1, 300, states=True) == 10
