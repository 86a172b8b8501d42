"""Draws against the softmax, noise against splitmix64 in Python integers."""

from __future__ import annotations

import math

import pytest
import torch
from lowvram_grpo.kernels.decode.noise import GOLDEN, draw, gumbel

from lowvram_grpo.rollout import noise
from lowvram_grpo.rollout.noise import stream_key


def keys(n, seed=0):
    return torch.tensor([stream_key(seed, 0, i) for i in range(n)])


def at(step, n):
    return torch.full((n,), step)


@pytest.mark.parametrize("vocab,by", [(50, "rows"), (300, "rows"), (300, "steps"), (50, "seeds")])
def test_draws_follow_the_softmax(vocab, by):
    """Chi-square over 20,000 draws; ids of little probability are counted together."""
    x = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    x[0, vocab // 2] = -torch.inf
    n = 20_000
    if by == "rows":
        drawn = draw(x.expand(n, -1), keys(n), at(3, n))
    elif by == "steps":
        drawn = torch.cat([draw(x.expand(100, -1), keys(100), at(t, 100)) for t in range(n // 100)])
    else:
        drawn = draw(x.expand(n, -1), torch.tensor([stream_key(s, 0, 0) for s in range(n)]), at(0, n))
    counts = torch.bincount(drawn, minlength=vocab).double()
    expected = x[0].double().softmax(0) * n
    assert counts[vocab // 2] == 0 and len(counts) == vocab
    often = expected > 10
    counts, expected = (torch.cat([v[often], v[~often].sum()[None]]) for v in (counts, expected))
    chi2, free = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    assert abs(chi2 - free) < 4 * math.sqrt(2 * free)


def test_two_draws_of_one_row_are_independent():
    x = torch.zeros(20_000, 256)
    a, b = draw(x, keys(20_000), at(0, 20_000)), draw(x, keys(20_000), at(1, 20_000))
    table = torch.bincount((a // 32) * 8 + b // 32, minlength=64).double()
    chi2 = float(((table - 312.5) ** 2 / 312.5).sum())
    assert abs(chi2 - 63) < 4 * math.sqrt(2 * 63)


def test_noise_is_splitmix64_and_depends_on_key_step_and_place_alone():
    k = stream_key(7, 2, 1)
    found = gumbel(torch.tensor([5, k]), torch.tensor([9, 3]), 1, 4)[1]
    start = noise._mix_int(k + (2 * 3 + 1 + 1) * GOLDEN)
    for i, value in enumerate(found.tolist(), 1):
        uniform = ((noise._mix_int(start + i * GOLDEN) >> 11) + 0.5) / 2**53
        assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)
    assert torch.equal(found, gumbel(torch.tensor([k]), torch.tensor([3]), 1, 9)[0, :4])
    # First outputs of splitmix64 with seed 0, as published with xoshiro.
    assert noise._mix_int(GOLDEN) == 0xE220A8397B1DCDAF
    assert noise._mix_int(2 * GOLDEN) == 0x6E789E6AA1B965F4


def test_streams_do_not_meet():
    found = {stream_key(s, p, g) for s in range(20) for p in range(20) for g in range(20)}
    assert len(found) == 8000 and min(found) >= -(2**63) and max(found) < 2**63


def test_a_rare_id_of_a_large_vocabulary_is_drawn_as_often_as_it_should():
    """A running float32 sum over 151,936 ids loses the last ones."""
    x = torch.zeros(1, 151_936).expand(100, -1)
    drawn = torch.cat([draw(x, keys(100), at(t, 100)) for t in range(10)]).double() / 151_936
    assert abs(float(drawn.mean()) - 0.5) < 4 / math.sqrt(12 * 1000)
    assert float(drawn.max()) > 0.99 and float(drawn.min()) < 0.01
