"""Completions that attend in two parts, to their prompt and to themselves, against one attention over both."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowvram_grpo.policy import shared_prefix, split_attention
from lowvram_grpo.policy.attention import AttentionParams
from lowvram_grpo.policy.shared_prefix import PrefixLayout
from lowvram_grpo.policy.split_attention import takes, worth_while

LENGTHS = {
    "equal": ([7, 7], [5, 5], [2]),
    "ragged, two groups": ([9, 9, 9, 4, 4], [6, 1, 3, 8, 2], [3, 2]),
    "nobody says anything": ([5, 5], [1, 1], [2]),
}


def layout(case):
    prompts, completions, groups = LENGTHS[case]
    width = max(prompts) + max(completions)
    return PrefixLayout(
        prompts, completions, groups, width=width, prompt_width=max(prompts), device=torch.device("cpu")
    )


def inputs(found, heads, shared, dtype):
    draw = lambda h: torch.randn(1, h, found.length, 16, dtype=dtype, requires_grad=True)
    return draw(heads), draw(shared), draw(shared)


def expected(case, query, key, value, scale):
    """Every completion behind its prompt, one after another, in float64."""
    prompts, completions, groups = LENGTHS[case]
    outs, at, row = [], 0, 0
    q, k, v = (x.double() for x in (query, key, value))
    repeat = q.shape[1] // k.shape[1]
    for count in groups:
        p, begin = prompts[row], at
        own = [n - 1 for n in completions[row : row + count]]
        places = [list(range(begin, begin + p))]
        at += p
        for n in own:
            places.append([*places[0], *range(at, at + n)])
            at += n
        for i, place in enumerate(places):
            part = [x[:, :, place] for x in (q, k, v)]
            part = [part[0], *(x.repeat_interleave(repeat, 1) for x in part[1:])]
            out = F.scaled_dot_product_attention(*part, is_causal=True, scale=scale)
            outs.append(out[:, :, p if i else 0 :])
        row += count
    return torch.cat(outs, 2).transpose(1, 2)


@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize("case", LENGTHS)
def test_two_parts_are_one_attention(monkeypatch, case, shared):
    monkeypatch.setattr(split_attention, "_COPIES", 1)
    calls = []
    real = shared_prefix.attend_in_parts
    monkeypatch.setattr(shared_prefix, "attend_in_parts", lambda *a: calls.append(1) or real(*a))
    torch.manual_seed(0)
    found = layout(case)
    params = AttentionParams(0.3, 0.0, None, None)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = inputs(found, 4, shared, dtype)
        out = found.attend(0, *given, params)
        reference = expected(case, *given, 0.3)
        weight = torch.randn_like(reference)
        grads = torch.autograd.grad(out, given, weight.to(dtype))
        wanted = torch.autograd.grad(reference, given, weight)
        for a, b in zip((out, *grads), (reference, *wanted)):
            assert (a - b).abs().max() <= bound
    assert bool(calls) == (case != "nobody says anything")


def test_short_groups_windows_and_dropout_keep_their_way():
    assert not worth_while(256, 8, 300) and worth_while(8192, 4, 4096) and worth_while(8192, 1, 4096)
    assert not worth_while(8192, 4, 0)
    query = torch.zeros(1, 2, 4, 16)
    full = AttentionParams(1.0, 0.0, None, None)
    assert takes(query, query, full, 100) and takes(query, query, full._replace(window=100), 100)
    other = {"window": 99}, {"dropout": 0.1}, {"softcap": 30.0}, {"sinks": torch.zeros(2)}
    for given in other:
        assert not takes(query, query, full._replace(**given), 100)
    assert not takes(query, query[..., :8], full, 100)


def test_no_copy_of_a_prompt_and_no_bias_is_made():
    """On meta: 4 completions of 64 tokens behind a prompt of 16,384, forward and backward."""
    from lowvram_grpo.memory.ledger import Ledger

    sizes = [16_384] * 4, [65] * 4, [4]
    device = torch.device("meta")
    with Ledger() as ledger:
        found = PrefixLayout(*sizes, width=16_449, prompt_width=16_384, device=device)
        given = [torch.zeros(1, 2, found.length, 16, device=device, requires_grad=True) for _ in range(3)]
        with ledger.phase("pass"):
            found.attend(0, *given, AttentionParams(1.0, 0.0, None, None)).sum().backward()
    whole = 4 * 2 * 16 * found.length  # bytes of keys: of one prompt and its completions
    copied = 4 * 2 * 16 * 5 * 16_384
    assert ledger.phases["pass"].bytes < 13 * whole < 4 * copied
