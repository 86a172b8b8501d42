"""Filters against transformers' own, draws against the softmax, noise against splitmix64 in Python integers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process as hf

from lowvram_grpo.rollout import sampler
from lowvram_grpo.rollout.sampler import (
    Sampler,
    Sampling,
    draw,
    forbid_unknown,
    gumbel,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    stream_key,
)

IDS = torch.tensor([[3, 4, 4, 9], [0, 50, 99, 7]])


def logits(scale=4.0, vocab=100, seed=0):
    return torch.randn(2, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def keys(n, seed=0):
    return torch.tensor([stream_key(seed, 0, i) for i in range(n)])


@pytest.mark.parametrize(
    "ours,theirs",
    [
        (lambda x: keep_top_k(x, 7), hf.TopKLogitsWarper(7)),
        (lambda x: keep_top_k(x, 500), hf.TopKLogitsWarper(500)),
        (lambda x: keep_top_p(x, 0.9), hf.TopPLogitsWarper(0.9)),
        (lambda x: keep_top_p(x, 0.0), hf.TopPLogitsWarper(0.0)),
        (lambda x: keep_min_p(x, 0.05), hf.MinPLogitsWarper(0.05)),
        (lambda x: keep_min_p(x, 1.0), hf.MinPLogitsWarper(1.0)),
    ],
    ids=["top-k", "top-k beyond V", "top-p", "top-p 0", "min-p", "min-p 1"],
)
def test_filters_are_those_of_transformers(ours, theirs):
    for x in (logits(), logits(0.1), logits().round(), torch.zeros(2, 100)):
        assert torch.equal(ours(x), theirs(IDS, x.clone()))


def test_repetition_penalty_is_that_of_transformers():
    seen = torch.zeros(2, 100, dtype=torch.bool).scatter_(1, IDS, True)
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.3)(IDS, logits())
    assert torch.equal(penalize_repetition(logits(), seen, 1.3), theirs) and not torch.equal(theirs, logits())


def test_filters_apply_in_the_order_of_transformers():
    at = Sampling(
        8, (5, 6), 0, temperature=0.7, top_p=0.8, top_k=30, min_p=0.02, repetition_penalty=1.3, known_ids=90,
        extra={"min_new_tokens": 3},
    )  # fmt: skip
    expected = forbid_unknown(logits(0.8), 90)
    for step in (hf.RepetitionPenaltyLogitsProcessor(1.3), hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(30),
                 hf.TopPLogitsWarper(0.8), hf.MinPLogitsWarper(0.02)):  # fmt: skip
        if isinstance(step, hf.TemperatureLogitsWarper):
            expected[:, [5, 6]] = -torch.inf
        expected = step(IDS, expected)
    ours = Sampler(at, keys(2), IDS, 100)._filtered(logits(0.8) / 0.7, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    kept = (expected > -torch.inf).sum(1)
    assert (kept > 1).all() and (kept < 30).all()
    late = Sampler(Sampling(8, (5, 6), 0, extra={"min_new_tokens": 3}), keys(2), IDS, 100)._filtered(logits(), 3)
    assert torch.equal(late, logits())


def test_log_probs_are_of_the_softmax_at_the_temperature_before_any_filter():
    at = Sampling(8, (5,), 0, temperature=0.7, top_k=3, repetition_penalty=1.5, known_ids=90)
    tokens, logps = Sampler(at, keys(2), IDS, 100)(logits(), 0)
    expected = torch.log_softmax(logits() / 0.7, 1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)
    greedy, logps = Sampler(Sampling(8, (5,), 0, temperature=0.0), keys(2), IDS, 100)(logits(), 0)
    assert torch.equal(greedy, logits().argmax(1))
    torch.testing.assert_close(logps, torch.log_softmax(logits(), 1).amax(1))


@pytest.mark.parametrize("vocab,by", [(50, "rows"), (300, "rows"), (300, "steps"), (50, "seeds")])
def test_draws_follow_the_softmax(vocab, by):
    """Chi-square over 20,000 draws; ids of little probability are counted together."""
    x = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    x[0, vocab // 2] = -torch.inf
    n = 20_000
    if by == "rows":
        drawn = draw(x.expand(n, -1), keys(n), 3)
    elif by == "steps":
        drawn = torch.cat([draw(x.expand(100, -1), keys(100), t) for t in range(n // 100)])
    else:
        drawn = draw(x.expand(n, -1), torch.tensor([stream_key(s, 0, 0) for s in range(n)]), 0)
    counts = torch.bincount(drawn, minlength=vocab).double()
    expected = x[0].double().softmax(0) * n
    assert counts[vocab // 2] == 0 and len(counts) == vocab
    often = expected > 10
    counts, expected = (torch.cat([v[often], v[~often].sum()[None]]) for v in (counts, expected))
    chi2, free = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    assert abs(chi2 - free) < 4 * math.sqrt(2 * free)


def test_two_draws_of_one_row_are_independent():
    x = torch.zeros(20_000, 256)
    a, b = draw(x, keys(20_000), 0), draw(x, keys(20_000), 1)
    table = torch.bincount((a // 32) * 8 + b // 32, minlength=64).double()
    chi2 = float(((table - 312.5) ** 2 / 312.5).sum())
    assert abs(chi2 - 63) < 4 * math.sqrt(2 * 63)


def test_noise_is_splitmix64_and_depends_on_key_step_and_place_alone():
    k = stream_key(7, 2, 1)
    noise = gumbel(torch.tensor([5, k]), 3, 1, 4)[1]
    start = sampler._mix_int(k + (2 * 3 + 1 + 1) * sampler._GOLDEN)
    for i, value in enumerate(noise.tolist(), 1):
        uniform = ((sampler._mix_int(start + i * sampler._GOLDEN) >> 11) + 0.5) / 2**53
        assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)
    assert torch.equal(noise, gumbel(torch.tensor([k]), 3, 1, 9)[0, :4])
    # First outputs of splitmix64 with seed 0, as published with xoshiro.
    assert sampler._mix_int(sampler._GOLDEN) == 0xE220A8397B1DCDAF
    assert sampler._mix_int(2 * sampler._GOLDEN) == 0x6E789E6AA1B965F4


def test_streams_do_not_meet():
    found = {stream_key(s, p, g) for s in range(20) for p in range(20) for g in range(20)}
    assert len(found) == 8000 and min(found) >= -(2**63) and max(found) < 2**63


def test_a_rare_id_of_a_large_vocabulary_is_drawn_as_often_as_it_should():
    """A running float32 sum over 151,936 ids loses the last ones."""
    x = torch.zeros(1, 151_936).expand(100, -1)
    drawn = torch.cat([draw(x, keys(100), t) for t in range(10)]).double() / 151_936
    assert abs(float(drawn.mean()) - 0.5) < 4 / math.sqrt(12 * 1000)
    assert float(drawn.max()) > 0.99 and float(drawn.min()) < 0.01
