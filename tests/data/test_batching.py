"""Which prompts go into which step: every one once an epoch, in an order that a resumed run can recompute."""

from __future__ import annotations

from itertools import pairwise

from lowvram_grpo.data.batching import PromptLoader, PromptSampler


def sampler(**overrides):
    return PromptSampler(**{"data": range(11), "prompts": 4, "repeats": 3, "shuffle": True, "seed": 5, **overrides})


def test_every_prompt_once_an_epoch_and_batches_repeated():
    batches = list(sampler())
    assert len(batches) == len(sampler()) == 9
    assert [len(b) for b in batches[::3]] == [4, 4, 3]
    assert sorted(i for b in batches[::3] for i in b) == list(range(11))
    assert all(a == b for n, (a, b) in enumerate(pairwise(batches)) if n % 3 != 2)


def test_order_is_a_function_of_seed_and_epoch():
    first, again, other = sampler(), sampler(), sampler(seed=6)
    assert list(first) == list(again) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)
    first.set_epoch(1)
    assert list(first) == list(again)
    assert next(iter(sampler(shuffle=False))) == [0, 1, 2, 3]


def test_the_loader_yields_rows_and_hands_the_epoch_on():
    rows = [{"prompt": str(i)} for i in range(11)]
    loader = PromptLoader(rows, sampler(data=rows))
    before = list(loader)
    assert before[0] == [rows[i] for i in next(iter(sampler()))]
    loader.set_epoch(1)
    assert list(loader) != before
