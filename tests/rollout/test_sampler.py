"""Filters against transformers' own, one by one and together, and the distribution of what is drawn through them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process as hf

from lowvram_grpo.rollout.noise import stream_key
from lowvram_grpo.rollout.sampler import (
    Sampler,
    Sampling,
    forbid_unknown,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

IDS = torch.tensor([[3, 4, 4, 9], [0, 50, 99, 7]])


def logits(scale=4.0, vocab=100, seed=0):
    return torch.randn(2, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def keys(n, seed=0):
    return torch.tensor([stream_key(seed, 0, i) for i in range(n)])


def sampler_for(at, ids=IDS, vocab=100):
    sampler = Sampler(at, len(ids), vocab, torch.device("cpu"))
    rows = list(range(len(ids)))
    sampler.admit(rows, torch.tensor(rows).repeat_interleave(ids.shape[1]), ids.flatten())
    return sampler


def steps(t, n=2):
    return torch.full((n,), t)


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
    ours = sampler_for(at)._filtered(logits(0.8) / 0.7, torch.tensor([2, 0]))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    kept = (expected > -torch.inf).sum(1)
    assert (kept > 1).all() and (kept < 30).all()
    late = sampler_for(Sampling(8, (5, 6), 0, extra={"min_new_tokens": 3}))._filtered(logits(), steps(3))
    assert torch.equal(late, logits())


def test_log_probs_are_of_the_softmax_at_the_temperature_before_any_filter():
    at = Sampling(8, (5,), 0, temperature=0.7, top_k=3, repetition_penalty=1.5, known_ids=90)
    tokens, logps = sampler_for(at)(logits(), keys(2), steps(0))
    expected = torch.log_softmax(logits() / 0.7, 1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)
    greedy, logps = sampler_for(Sampling(8, (5,), 0, temperature=0.0))(logits(), keys(2), steps(0))
    assert torch.equal(greedy, logits().argmax(1))
    torch.testing.assert_close(logps, torch.log_softmax(logits(), 1).amax(1))


FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 12},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.5},
    "known ids": {"known_ids": 60},
    "minimum length": {"extra": {"min_new_tokens": 9}},
    "all": {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "known_ids": 90},
}


def reference(row, prompt, settings):
    """The distribution in float64, by transformers' processors."""
    chain = []
    if "extra" in settings:
        chain.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), 9, prompt[:2].tolist(), device="cpu"))
    if "repetition_penalty" in settings:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    chain.append(hf.TemperatureLogitsWarper(settings.get("temperature", 1.0)))
    if "top_k" in settings:
        chain.append(hf.TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        chain.append(hf.TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        chain.append(hf.MinPLogitsWarper(settings["min_p"]))
    row = row.double()[None].clone()
    row[:, settings.get("known_ids", 100) :] = -torch.inf
    for step in chain:
        row = step(prompt[None], row)
    return row[0].softmax(0)


@pytest.mark.parametrize("name", FILTERS)
def test_what_is_drawn_follows_the_filtered_softmax(name):
    """Chi-square over 20,000 draws, in parts of different sizes as waves would be."""
    row, n = logits(1.5)[0], 20_000
    prompt = row.topk(4).indices
    at = Sampling(16, tuple(prompt[:2].tolist()), 0, **FILTERS[name])
    drawn = []
    for first, last in ((0, 7_001), (7_001, n)):
        sampler = sampler_for(at, prompt.expand(last - first, -1))
        k = keys(n)[first:last]
        drawn.append(sampler(row.expand(last - first, -1).clone(), k, steps(3, last - first))[0])
    counts = torch.bincount(torch.cat(drawn), minlength=100).double()
    expected = reference(row, prompt, FILTERS[name]) * n
    assert counts[expected == 0].sum() == 0
    chi2, free = chi_square(counts, expected)
    assert chi2 < free + 4 * math.sqrt(2 * free)
    if name != "none":
        wrong, free = chi_square(counts, reference(row, prompt, {}) * n)
        assert wrong > free + 20 * math.sqrt(2 * free)


def chi_square(counts, expected):
    """The statistic and its degrees of freedom; ids of little expectation are counted together."""
    often = expected > 10
    counts, expected = (torch.cat([v[often], v[~often].sum()[None]]) for v in (counts, expected))
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1


def test_a_whole_engine_draws_from_the_models_softmax(model):
    from lowvram_grpo.rollout.engine import RolloutEngine

    prompt, n = [5, 6, 7, 8], 20_000
    batch = RolloutEngine(model, Sampling(2, (), 0, temperature=1.3), rows=6_000).generate([prompt], n, seed=1)
    first = torch.bincount(torch.tensor([c[0] for c in batch.completion_ids]), minlength=41).double()
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / 1.3).softmax(0)
        second_of = int(first.argmax())
        after = (model(torch.tensor([[*prompt, second_of]])).logits[0, -1].double() / 1.3).softmax(0)
    second = torch.tensor([c[1] for c in batch.completion_ids if c[0] == second_of])
    for counts, probs in ((first, expected), (torch.bincount(second, minlength=41).double(), after)):
        chi2, free = chi_square(counts, probs * counts.sum())
        assert free > 5 and chi2 < free + 4 * math.sqrt(2 * free)
