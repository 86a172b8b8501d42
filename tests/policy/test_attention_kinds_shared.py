"""Shared prompts in today's families: losses and gradients of the plain path, sinks' own among them."""

from __future__ import annotations

import pytest
import torch
from passes import GROUPS, adapted, assert_same, micro_batch, training_pass

from lowvram_grpo.policy.attend import attend_by_blocks, attend_causally, causal_bias, causal_mask, repeat_kv
from lowvram_grpo.policy.attention import NAME, keep_caps
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.shared_prefix import PrefixLayout, why_not
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from tests.attention_families import FAMILIES, as_transformers_has_it, tiny_family

# Where it is larger, gradients of Gemma 4 differ by 1e-3 for nothing but the order of sums (by 4e-5 in float64, in
# which its norms stay float32).
CALM = {"initializer_range": 0.2}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_changes_neither_log_probs_nor_gradients(family):
    """With checkpointing and without; under our name the plain path is transformers' own, with sinks and caps."""
    model = adapted(tiny_family(family, **CALM))
    batch = micro_batch(vocab=97)
    with as_transformers_has_it(model.get_base_model()):
        plain = training_pass(model, batch)
    assert why_not(model) is None and model.get_base_model().config._attn_implementation == NAME
    assert_same(plain, training_pass(model, batch))
    assert_same(plain, training_pass(model, batch, group_sizes=GROUPS))
    checkpoint_activations(model)
    assert_same(plain, training_pass(model, batch, group_sizes=GROUPS))


@pytest.mark.parametrize("family", ["gpt-oss: sinks", "gemma2: soft-capping", "gemma4: shared keys"])
def test_all_weights_get_their_gradients(family):
    model, batch = tiny_family(family, **CALM), micro_batch(vocab=97)
    with as_transformers_has_it(model):
        plain = training_pass(model, batch)
    assert why_not(model) is None
    for shared in (training_pass(model, batch), training_pass(model, batch, group_sizes=GROUPS)):
        assert_same(plain, shared)
    if "sinks" in family:
        sinks = [g for name, g in shared[1].items() if name.endswith("sinks")]
        assert len(sinks) == 4 and all(g.abs().max() > 1e-3 for g in sinks)


def test_transformers_generate_goes_on_under_our_name():
    """A cache, one query a step, padding on the left: sinks and caps are still there."""
    for family in ("gpt-oss: sinks", "gemma2: soft-capping"):
        model = tiny_family(family)
        ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18, 19, 20]])
        settings = {"max_new_tokens": 9, "do_sample": False, "attention_mask": (ids != 0).long()}
        with as_transformers_has_it(model):
            before = model.generate(ids, **settings)
        assert why_not(model) is None
        assert torch.equal(model.generate(ids, **settings), before)


def test_sampled_is_scored_with_shared_prompts():
    """The engine before and after the question, for a model whose own attention is eager."""
    model = tiny_family("gpt-oss: sinks")
    engine = RolloutEngine(model, Sampling(temperature=0.8, max_new_tokens=6, eos_ids=(1,), pad_id=0))
    before = engine.generate([[5, 6, 7], [8, 9]], 2, seed=3)
    assert why_not(model) is None
    assert engine.generate([[5, 6, 7], [8, 9]], 2, seed=3).completion_ids == before.completion_ids


def test_caps_are_not_left_to_sdpa():
    """Which drops them where transformers lets it (before 5.24)."""
    model, ids = tiny_family("gemma2: soft-capping"), torch.arange(3, 20)[None]
    with as_transformers_has_it(model):
        right = model(ids).logits
    model.config._attn_implementation = "sdpa"
    keep_caps(model)
    torch.testing.assert_close(model(ids).logits, right, rtol=1e-4, atol=1e-5)
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(model(ids).logits, right, atol=1e-2)


def test_eager_that_was_asked_for_is_kept():
    assert "eager, not sdpa" in why_not(tiny_family("olmo3", attn_implementation="eager"))


# The formula, against float64


def exact(q, k, v, sinks, mask, scale, softcap):
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (repeat_kv(x, q.shape[1]) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


def ways(q, k, v, sinks, before, window, softcap):
    """Each that computes this case, by name."""
    t, both = q.shape[2], {"scale": 0.3, "sinks": sinks}
    mask = causal_mask(before, t, window, q.device)
    found = {
        "blocks": lambda: attend_by_blocks(q, k, v, softcap=softcap, before=before, window=window, **both),
        "blocks, mask": lambda: attend_by_blocks(q, k, v, softcap=softcap, mask=mask, **both),
        "blocks, bias": lambda: attend_by_blocks(
            q, k, v, softcap=softcap, mask=causal_bias(before, t, window, q.dtype, q.device), **both
        ),
    }
    if softcap is None and sinks is not None:
        bias = causal_bias(before, t, window, q.dtype, q.device)
        found |= {
            "kernel, bias": lambda: attend_causally(q, k, v, bias, **both),
            "kernel, mask": lambda: attend_causally(q, k, v, mask[None, None].expand(len(q), 1, -1, -1), **both),
        }
        if not before and window is None:
            found["kernel"] = lambda: attend_causally(q, k, v, None, **both)
    return found


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [True, False])
@pytest.mark.parametrize("b,kv_heads,t,before,window", [(1, 2, 300, 0, None), (2, 4, 7, 13, 5), (1, 1, 270, 11, 40)])
def test_attention_and_its_gradients_against_float64(b, kv_heads, t, before, window, with_sinks, softcap):
    """Several blocks of queries, grouped heads, windows."""
    drawn = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=drawn).requires_grad_()
    q, k, v = draw(b, 4, t, 12), draw(b, kv_heads, before + t, 12), draw(b, kv_heads, before + t, 12)
    sinks = draw(4) if with_sinks else None
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    right = exact(q, k, v, sinks, causal_mask(before, t, window, q.device), 0.3, softcap)
    weights = torch.randn(right.shape, generator=drawn)
    gradients = torch.autograd.grad((right * weights).sum(), leaves)
    for name, run in ways(q, k, v, sinks, before, window, softcap).items():
        out = run()
        torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=2e-6, msg=name)
        for found, expected in zip(torch.autograd.grad((out * weights).sum(), leaves), gradients):
            worst = (found.double() - expected).abs().max() / expected.abs().max()
            assert worst < 2e-6, (name, worst)
        with torch.no_grad():
            torch.testing.assert_close(run(), out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_query_that_sees_nothing_is_no_nan(softcap):
    """Padding on the left, under a mask that transformers makes."""
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., :2] = False
    q = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sinks = torch.zeros(4, requires_grad=True)
    for out in (
        attend_by_blocks(q, q, q, scale=0.3, softcap=softcap, sinks=sinks, mask=mask),
        attend_causally(q, q, q, mask, scale=0.3, sinks=sinks),
    ):
        assert not out[:, :, :2].any()
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), [q, sinks]))


def test_no_scores_of_all_tokens_are_held():
    """Of 2,000 tokens, at once 4 heads x 2,000 x 2,000 float32 are 61 MiB."""
    from lowvram_grpo.memory.ledger import Ledger

    for settings in ({"softcap": 2.0}, {}):
        q, k, v = (torch.randn(1, 4, 2000, 8, requires_grad=True) for _ in range(3))
        sinks = torch.zeros(4, requires_grad=True)
        with Ledger() as ledger:
            if settings:
                out = attend_by_blocks(q, k, v, scale=0.3, sinks=sinks, **settings)
            else:
                out = attend_causally(q, k, v, None, scale=0.3, sinks=sinks)
            out.sum().backward()
        assert ledger.peak < 61 * 2**20


def test_a_forgotten_sink_would_show_in_shared_prompts(monkeypatch):
    model, batch = adapted(tiny_family("gpt-oss: sinks")), micro_batch(vocab=97)
    plain = training_pass(model, batch)
    assert why_not(model) is None
    attend = PrefixLayout._by_params
    monkeypatch.setattr(
        PrefixLayout, "_by_params", lambda self, q, k, v, before, params: attend(
            self, q, k, v, before, params._replace(sinks=None)
        ),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        assert_same(plain, training_pass(model, batch, group_sizes=GROUPS))
