"""Block masses against float64, and draws by them against the plain way."""

from __future__ import annotations

import math

import pytest
import torch
from lowvram_grpo.kernels.decode.sample import (
    block_masses,
    block_masses_ref,
    block_masses_triton,
    draw_by_masses,
    draw_by_masses_ref,
    draw_by_masses_triton,
)
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

from lowvram_grpo.rollout import sampler as sampler_module
from lowvram_grpo.rollout.noise import stream_key
from lowvram_grpo.rollout.sampler import Sampler, Sampling

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")

DEVICE = torch.device("cpu" if interpreted() else "cuda")


def logits(rows, vocab, scale=4.0, seed=0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def exact(x, temperature, known):
    x = x.double() / temperature
    blocks = range(0, x.shape[1], 128)
    masked = x.clone()
    masked[:, known:] = -torch.inf
    return [torch.stack([m[:, b : b + 128].logsumexp(1) for b in blocks], 1) for m in (masked, x)]


@pytest.mark.parametrize(
    "vocab,known", [(1, None), (127, 100), (128, 128), (2_500, 2_301), (2_500, 300), (1_025, None)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_masses_are_no_worse_than_eagers(vocab, known, temperature):
    x = logits(3, vocab)
    right = exact(x, temperature, vocab if known is None else known)
    eager, found = (f(x, temperature, known) for f in (block_masses_ref, block_masses_triton))
    for ours, slow, true in zip(found, eager, right):
        assert ours.shape == slow.shape == true.shape and torch.equal(ours.isinf(), true.isinf())
        finite = true.isfinite()
        error, allowed = ((a.double() - true)[finite].abs() for a in (ours, slow))
        assert (error <= 2 * allowed.max() + 1e-6 * (1 + true[finite].abs())).all()
    assert (found[0] is found[1]) == (known is None or known >= vocab)


def test_large_logits_infinities_and_nans():
    x = logits(5, 300)
    x[0] += 3e4
    x[1, :128] = -torch.inf
    x[2, 200] = torch.inf
    x[3, 5] = torch.nan
    x[4] = -torch.inf
    for known in (None, 290):
        found, expected = block_masses_triton(x, 0.5, known), block_masses_ref(x, 0.5, known)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_logits_whose_rows_lie_apart():
    x = logits(3, 400)[:, :300]
    torch.testing.assert_close(block_masses_triton(x)[0], block_masses_ref(x)[0], rtol=1e-6, atol=1e-6)


def test_elsewhere_than_on_cuda_it_is_pytorch():
    x = logits(2, 300).cpu()
    assert all(map(torch.equal, block_masses(x, 0.7, 200), block_masses_ref(x, 0.7, 200)))


def both(settings, x, keys, steps, monkeypatch):
    """(tokens, log-probs) of the rows of x (n, V), drawn len(keys) / n times each, the plain way and by the kernel."""
    times = len(keys) // len(x)
    many = lambda rows: rows.repeat_interleave(times, 0)
    # The interpreter takes a millisecond a program: each row's masses are computed once.
    once = lambda _, *rest: tuple(many(m) for m in block_masses_triton(x, *rest))
    monkeypatch.setattr(sampler_module, "block_masses", once)
    monkeypatch.setattr(sampler_module, "draw_by_masses", draw_by_masses_ref)
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(sampler_module, "has_kernel", lambda logits, kernel=kernel: kernel)
        made = Sampler(Sampling(8, (5,), 0, **settings), len(keys), x.shape[1], x.device, fused=True)
        found.append(made(many(x), keys, steps))
    return found


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "known_ids": 1_201}])
def test_the_same_tokens_are_drawn_with_the_same_log_probs(settings, monkeypatch):
    rows, times, vocab = 5, 4_000, 1_300
    n = rows * times
    x = logits(rows, vocab, 1.5)
    keys = torch.tensor([stream_key(0, 0, i) for i in range(n)], device=DEVICE)
    plain, ours = both(settings, x, keys, torch.full_like(keys, 3), monkeypatch)
    alike = plain[0] == ours[0]
    assert int(alike.sum()) >= 0.999 * n
    torch.testing.assert_close(ours[1][alike], plain[1][alike], rtol=1e-6, atol=2e-6)
    z = x.cpu().double() / settings.get("temperature", 1.0)
    z[:, settings.get("known_ids", vocab) :] = -torch.inf
    for row, drawn in zip(z, ours[0].cpu().view(rows, times)):
        counts, expected = torch.bincount(drawn, minlength=vocab).double(), row.softmax(0) * times
        assert counts[expected == 0].sum() == 0
        often = expected > 10
        counts, expected = (torch.cat([v[often], v[~often].sum()[None]]) for v in (counts, expected))
        chi2, free = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
        assert free > 10 and abs(chi2 - free) < 4 * math.sqrt(2 * free)


@pytest.mark.parametrize("vocab,known", [(1, None), (130, 129), (2_500, 2_301), (1_025, None), (300, 100)])
def test_the_kernel_draws_what_operators_draw(vocab, known):
    rows = 60
    x = logits(rows, vocab + 7, 2.0)[:, :vocab]
    keys = torch.tensor([stream_key(1, 0, i) for i in range(rows)], device=DEVICE)
    keys, steps = (torch.stack([t, t + 1], 1)[:, 0] for t in (keys, torch.arange(rows, device=DEVICE) % 9))
    given = (x, *block_masses_ref(x, 0.8, known), keys, steps, 0.8, known)
    (ids, logps), (expected, their_logps) = draw_by_masses_triton(*given), draw_by_masses_ref(*given)
    assert ids.dtype == torch.long and torch.equal(ids, expected) and ids.max() < (known or vocab)
    torch.testing.assert_close(logps, their_logps, rtol=1e-6, atol=2e-6)
    exact = (x.double() / 0.8).log_softmax(1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), exact, rtol=0, atol=1e-5)
    assert vocab < 100 or len(set(ids.tolist())) > 20
    if DEVICE.type == "cpu":
        assert all(map(torch.equal, draw_by_masses(*given), (expected, their_logps)))


def test_a_nan_is_drawn_as_some_id_with_a_log_prob_that_says_so():
    x = logits(3, 140)
    x[0], x[1, 139], x[2] = torch.nan, torch.nan, -torch.inf
    keys = torch.arange(3, device=DEVICE)
    ids, logps = draw_by_masses_triton(x, *block_masses_triton(x), keys, keys, 1.0, None)
    assert (ids >= 0).all() and (ids < 140).all() and logps.isnan().all()


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.2},
     {"extra": {"min_new_tokens": 4}}],
)  # fmt: skip
def test_greedy_and_filtered_sampling_take_the_plain_way(settings, monkeypatch):
    def refuse(*_):
        raise RuntimeError("by blocks")

    x, keys = logits(2, 300), torch.tensor([3, 4], device=DEVICE)
    monkeypatch.setattr(Sampler, "_by_blocks", refuse)
    plain, ours = both(settings, x, keys, torch.zeros_like(keys), monkeypatch)
    assert all(map(torch.equal, plain, ours))
    with pytest.raises(RuntimeError, match="by blocks"):
        both({}, x, keys, torch.zeros_like(keys), monkeypatch)
