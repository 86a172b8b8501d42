"""Entries made by kernels are those that PyTorch's operators make, whatever order lists were filled in."""

from __future__ import annotations

import math

import pytest
import torch
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from lowvram_grpo.kernels.sweep.lists import entries_of
from lowvram_grpo.kernels.sweep.state import RowState
from lowvram_grpo.kernels.transform import Transform

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
DEVICE = torch.device("cpu" if interpreted() else "cuda")
VOCAB, ROWS, CAPACITY, EPSILON, MAX_TAIL = 301, 9, 150, 2.0**-10, 0.02


def swept(softcap, seed=0):
    """Rows after a sweep: most peaked, one flat (its tail is missing), one that overflowed, and lists in a random order
    with entries that are no longer above the final threshold."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(ROWS, VOCAB, generator=g)
    for row in range(ROWS):
        raw[row, torch.randperm(VOCAB, generator=g)[: 3 + 16 * row]] += 9.0
    raw[4] *= 0.1
    transform = Transform(1.0, softcap, 0.7)
    logits = transform(raw.clone())
    ref = logits + torch.randn(ROWS, VOCAB, generator=g) * 0.3
    targets = torch.randint(0, VOCAB, (ROWS,), generator=g)
    m, at = logits.amax(1), torch.arange(ROWS)
    p, d0 = (logits - m[:, None]).exp(), logits[at, targets] - ref[at, targets]
    d = logits - ref - d0[:, None]
    state = RowState.start(targets, logits[at, targets], ref[at, targets], CAPACITY)
    sums = [m, p.sum(1), (p * (logits - m[:, None])).sum(1), logits[at, targets], ref.amax(1)]
    sums += [(ref - ref.amax(1, keepdim=True)).exp().sum(1), ref[at, targets], d0, (p * d).sum(1), (p * d * d).sum(1)]
    state.stats.copy_(torch.stack(sums))
    lse = m + p.sum(1).log()
    for row in range(ROWS):
        above = (logits[row] > lse[row] + math.log(EPSILON) - 1.5).nonzero()[:, 0]
        above = above[torch.randperm(len(above), generator=g)][:CAPACITY]
        n = len(above)
        state.ids[row, :n], state.logits[row, :n] = above.int(), logits[row, above]
        state.ref_logits[row, :n] = ref[row, above]
        state.logits[row, n:], state.count[row] = torch.nan, n
    state.count[2] = CAPACITY + 7
    moved = {name: value.to(DEVICE) for name, value in vars(state).items()}
    return RowState(**moved), transform


def made(state, transform, wanted, kernels, shuffled=True, max_tail=MAX_TAIL, **keep):
    return entries_of(
        state, transform, epsilon=EPSILON, max_tail=max_tail, wanted=wanted, shuffled=shuffled, vocab=VOCAB,
        scratch=4096, kernels=kernels, **keep,
    )  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 12.0])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("keep", [(False, False), (True, False), (True, True)], ids=["logp", "kl", "kl-entropy"])
def test_kernels_make_the_entries_of_the_reference(softcap, some, keep):
    state, transform = swept(softcap)
    wanted = torch.tensor([True] * 5 + [False, True, False, True], device=DEVICE) if some else None
    keep = dict(zip(("keep_kl", "keep_entropy"), keep))
    (expected, diffuse, spread, told), found = (made(state, transform, wanted, way, **keep) for way in (False, True))
    assert found[3] == told and found[1].tolist() == diffuse.tolist() == [2, 4]
    assert told.overflowed == 1 and told.ends[-1] > 100
    for name in expected._fields:
        ours, theirs = getattr(found[0], name), getattr(expected, name)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(found[2], spread, rtol=1e-3, atol=1e-4)


def test_the_order_of_a_list_changes_no_bit():
    state, transform = swept(None)
    first = made(state, transform, None, True, keep_kl=True, keep_entropy=True)[0]
    for row, n in enumerate(state.count.clamp(max=CAPACITY).tolist()):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(row)).to(DEVICE)
        for column in (state.ids, state.logits, state.ref_logits):
            column[row, :n] = column[row, order]
    again = made(state, transform, None, True, keep_kl=True, keep_entropy=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_lists_that_are_in_order_need_no_ranks():
    state, transform = swept(None)
    for row, n in enumerate(state.count.clamp(max=CAPACITY).tolist()):
        order = state.ids[row, :n].argsort()
        for column in (state.ids, state.logits, state.ref_logits):
            column[row, :n] = column[row, order]
    keep = {"keep_kl": True, "keep_entropy": False}
    ranked, counted = (made(state, transform, None, True, way, **keep)[0] for way in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(ranked, counted))


def test_a_row_is_diffuse_from_the_tail_on_that_is_allowed():
    state, transform = swept(None)
    keep = {"keep_kl": False, "keep_entropy": False}
    tail = float(made(state, transform, None, False, max_tail=0.5, **keep)[0].tail[7])
    assert 1e-4 < tail < 0.1
    for factor in (0.999, 1.001):
        by_reference, by_kernels = (
            made(state, transform, None, way, max_tail=factor * tail, **keep)[1].tolist() for way in (False, True)
        )
        assert by_reference == by_kernels and (7 in by_kernels) == (factor < 1)
