"""The objective against a naive float64 implementation written from the papers, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch

from lowvram_grpo.objective import (
    LOSS_TYPES,
    Objective,
    decoupled_advantages,
    group_advantages,
    grpo_loss,
    kl_divergence,
    token_weights,
)


def policy_term(ratio, logp, a, o: Objective):
    """One token's, from the papers."""
    upper = o.epsilon if o.epsilon_high is None else o.epsilon_high
    if o.loss_type == "cispo":
        return -min(float(ratio.detach()), upper) * a * logp
    if o.loss_type == "vespo":
        return -a * logp
    if o.loss_type == "sapo":
        tau = o.sapo_temperature_pos if a > 0 else o.sapo_temperature_neg
        return -(4 / tau) / (1 + torch.exp(-tau * (ratio - 1))) * a
    bounded = ratio if o.delta is None else torch.clamp(ratio, max=o.delta)
    return -torch.min(bounded * a, torch.clamp(ratio, 1 - o.epsilon, 1 + upper) * a)


def naive_loss(logps, old, ref, advantages, mask, o: Objective, t_max: int, factor=None):
    """Python loops over tokens; float64; gradients by autograd through the loops."""
    B, T = logps.shape
    total_tokens = sum(int(mask[i].sum()) for i in range(B))
    loss = logps.new_zeros(())
    for i in range(B):
        length = int(mask[i].sum())
        if not length:
            continue
        if o.importance_sampling_level == "sequence":
            mean = sum(logps[i, t] - old[i, t] for t in range(T) if mask[i, t]) / length
        for t in range(T):
            if not mask[i, t]:
                continue
            ratio = torch.exp(mean if o.importance_sampling_level == "sequence" else logps[i, t] - old[i, t])
            term = policy_term(ratio, logps[i, t], advantages[i], o)
            if factor is not None:
                term = term * factor[i, t]
            if ref is not None:
                d = ref[i, t] - logps[i, t]
                kl = {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[o.kl_estimator]
                term = term + o.beta * kl * (ratio if o.use_bias_correction_kl else 1)
            weight = {
                "grpo": 1 / length / B,
                "sapo": 1 / length / B,
                "bnpo": 1 / total_tokens,
                "dapo": 1 / total_tokens,
                "cispo": 1 / total_tokens,
                "vespo": 1 / total_tokens,
                "dr_grpo": 1 / (B * t_max),
                "luspo": 1 / B,
            }
            loss = loss + term * weight[o.loss_type]
    return loss


def batch(seed=0, B=6, T=7):
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3
    old = logps + torch.randn(B, T, generator=g, dtype=torch.float64) * 0.3
    ref = logps + torch.randn(B, T, generator=g, dtype=torch.float64) * 0.3
    lengths = [7, 1, 4, 0, 6, 2]
    mask = torch.tensor([[t < n for t in range(T)] for n in lengths])
    return logps, old, ref, torch.randn(B, generator=g, dtype=torch.float64), mask


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("extra", [
    {}, {"epsilon_high": 0.28}, {"delta": 1.1}, {"use_bias_correction_kl": False, "sapo_temperature_pos": 0.7},
])  # fmt: skip
def test_loss_and_gradient(loss_type, estimator, level, extra):
    logps, old, ref, advantages, mask = batch()
    factor = None
    if loss_type == "vespo" or "delta" in extra:
        factor = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    o = Objective(beta=0.3, loss_type=loss_type, kl_estimator=estimator, importance_sampling_level=level, **extra)
    a, b = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    weights = token_weights(mask, loss_type, 9)
    terms = grpo_loss(a, old, ref, advantages, mask, weights, o, factor=factor)
    expected = naive_loss(b, old, ref, advantages, mask, o, 9, factor)
    terms.loss.backward(), expected.backward()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-6, atol=1e-9)  # weights are float32
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)
    assert a.grad[~mask].abs().max() == 0
    kl = kl_divergence(logps, ref, mask, estimator) * (terms.ratio if o.use_bias_correction_kl else 1)
    torch.testing.assert_close(terms.kl, kl)


def test_a_factor_leaves_the_kl_alone_and_may_be_junk_where_masked():
    logps, old, ref, advantages, mask = batch()
    weights = token_weights(mask, "grpo", 9)
    nothing, plain = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    junk = torch.zeros_like(logps).masked_fill(~mask, math.nan)
    o = Objective(beta=0.3)
    left = grpo_loss(nothing, old, ref, advantages, mask, weights, o, factor=junk)
    kl_alone = grpo_loss(plain, old, ref, 0 * advantages, mask, weights, o)
    left.loss.backward(), kl_alone.loss.backward()
    torch.testing.assert_close(left.loss, kl_alone.loss)
    torch.testing.assert_close(nothing.grad, plain.grad)


def test_what_is_detached_has_no_gradient_and_the_rest_gradcheck_confirms():
    """Finite differences know nothing of a detached coefficient, so the types that have one are left to the loops."""
    logps, old, ref, advantages, mask = batch()
    for loss_type in ("grpo", "sapo", "luspo"):
        for level in ("token", "sequence"):
            o = Objective(beta=0.3, loss_type=loss_type, importance_sampling_level=level)
            weights = token_weights(mask, loss_type, 9).double()
            run = lambda x: grpo_loss(x, old, ref, advantages, mask, weights, o).loss  # noqa: B023
            assert torch.autograd.gradcheck(run, logps.clone().requires_grad_())


def test_cispo_keeps_the_gradient_of_what_grpo_clips():
    logps, old, _, _, mask = batch()
    weights, high = token_weights(mask, "cispo", 9), torch.full((6,), 1.0, dtype=torch.float64)
    terms, grads = {}, {}
    for loss_type, upper in (("cispo", 1.1), ("grpo", 0.1)):
        leaf = logps.clone().requires_grad_()
        o = Objective(beta=0.0, loss_type=loss_type, epsilon_high=upper)
        terms[loss_type] = grpo_loss(leaf, old, None, high, mask, weights, o)
        terms[loss_type].loss.backward()
        grads[loss_type] = leaf.grad
    over = terms["cispo"].high_clipped
    assert over.any() and torch.equal(over, terms["grpo"].high_clipped) and not terms["cispo"].low_clipped.any()
    assert grads["grpo"][over].abs().max() == 0
    torch.testing.assert_close(grads["cispo"][over], -1.1 * weights.double()[over])


def test_vespo_without_its_weight_is_refused_and_so_is_an_unknown_type():
    logps, old, _, advantages, mask = batch()
    given = (logps, old, None, advantages, mask, mask.float())
    with pytest.raises(ValueError, match="needs factor, with vespo_weight"):
        grpo_loss(*given, Objective(beta=0.0, loss_type="vespo"))
    with pytest.raises(ValueError, match="unknown loss_type 'ppo'"):
        grpo_loss(*given, Objective(beta=0.0, loss_type="ppo"))
    with pytest.raises(ValueError, match="unknown loss_type 'ppo'"):
        token_weights(mask, "ppo", 9)


def test_a_token_of_a_rollout_weighs_the_same_in_each_of_its_steps():
    _, _, _, _, mask = batch()
    first, second = mask[:3], mask[3:]
    for loss_type in ("dapo", "cispo", "vespo"):
        cut = [token_weights(part, loss_type, 9, mask.sum() * len(part) / 6) for part in (first, second)]
        assert {float(w) for part in cut for w in part[part > 0]} == {float(2 / mask.sum())}
        assert torch.equal(token_weights(mask, loss_type, 9, mask.sum()), token_weights(mask, "bnpo", 9))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_exact_kl_takes_no_ratio(level):
    logps, old, _, advantages, mask = batch()
    weights, kl = token_weights(mask, "dapo", 9), torch.rand_like(logps)
    o = [Objective(kl_estimator="exact", importance_sampling_level=level, use_bias_correction_kl=b) for b in (0, 1)]
    losses = [grpo_loss(logps, old, None, advantages, mask, weights, x, kl=kl).loss for x in o]
    assert torch.equal(*losses)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bounds", [
    {"epsilon": 0.0},
    {"epsilon": 0.0, "epsilon_high": 0.2},
    {"epsilon": 0.2, "epsilon_high": 0.0},
    {"delta": 1.0},
    {"delta": 1.0, "epsilon": 0.0},
])  # fmt: skip
def test_a_ratio_on_a_bound_is_inside_whatever_the_torch(level, bounds):
    """The first update of a rollout, ratio 1 everywhere: -A w a token. torch.clamp's own slope there became 0 in 2.14,
    which leaves half of that for epsilon 0, and nothing for delta 1 under it."""
    logps, _, _, advantages, mask = batch()
    logps.requires_grad_()
    weights = token_weights(mask, "dapo", 9)
    o = Objective(beta=0.0, importance_sampling_level=level, **bounds)
    grpo_loss(logps, None, None, advantages, mask, weights, o).loss.backward()
    torch.testing.assert_close(logps.grad, -advantages[:, None] * weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("d", [20.0, -20.0])
def test_a_log_ratio_on_the_clamp_still_pulls(d):
    """The slopes of -d, d^2 / 2 and exp(d) - d - 1 in logp, at the last d that has one."""
    for estimator, slope in {"k1": 1.0, "k2": -d, "k3": 1 - math.exp(d)}.items():
        logps = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        ref, mask = torch.tensor([[d, d * 1.01]], dtype=torch.float64), torch.ones(1, 2)
        kl_divergence(logps, ref, mask, estimator).sum().backward()
        torch.testing.assert_close(logps.grad, torch.tensor([[slope, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_exact_kl_is_taken_as_it_is(level):
    """Its weight and gradient are beta w, the rest of the loss is that without a KL, and masked junk stays outside."""
    logps, old, ref, advantages, mask = batch()
    weights = token_weights(mask, "dapo", 9)
    without = Objective(beta=0.0, importance_sampling_level=level)
    exact = Objective(beta=0.3, importance_sampling_level=level, kl_estimator="exact")
    a, b = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    kl = (logps - old).abs().masked_fill(~mask, math.nan).requires_grad_()
    plain = grpo_loss(a, old, None, advantages, mask, weights, without).loss
    terms = grpo_loss(b, old, ref, advantages, mask, weights, exact, kl=kl)
    plain.backward(), terms.loss.backward()
    torch.testing.assert_close(terms.loss, plain + 0.3 * (weights * kl)[mask].sum())
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(kl.grad, 0.3 * weights.double())
    assert torch.equal(terms.kl, kl.detach().masked_fill(~mask, 0.0))


def test_a_kl_from_the_wrong_source_is_refused():
    logps, old, ref, advantages, mask = batch()
    given = (logps, old, ref, advantages, mask, mask.float())
    with pytest.raises(ValueError, match="needs kl"):
        grpo_loss(*given, Objective(kl_estimator="exact"))
    with pytest.raises(ValueError, match="'k3' takes ref_logps"):
        grpo_loss(*given, Objective(), kl=ref)


def test_first_update_has_ratio_exactly_one_and_the_policy_gradient():
    logps, _, _, advantages, mask = batch()
    logps.requires_grad_()
    weights = token_weights(mask, "dapo", 9)
    terms = grpo_loss(logps, None, None, advantages, mask, weights, Objective(beta=0.0))
    assert bool((terms.ratio == 1).all()) and not terms.low_clipped.any() and not terms.high_clipped.any()
    terms.loss.backward()
    torch.testing.assert_close(logps.grad, -advantages[:, None] * weights.double() * mask)


def test_kl_is_zero_for_equal_policies_and_k3_never_negative():
    logps, _, ref, _, mask = batch()
    for estimator in ("k1", "k2", "k3"):
        assert kl_divergence(logps, logps, mask, estimator).abs().max() == 0
    assert kl_divergence(logps, ref, mask, "k3").min() >= 0


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_masked_junk_does_not_poison(estimator):
    logps, old, ref, advantages, mask = batch()
    weights = token_weights(mask, "grpo", 9)
    clean = logps.clone().requires_grad_()
    o = Objective(beta=0.1, kl_estimator=estimator)
    grpo_loss(clean, old, ref, advantages, mask, weights, o).loss.backward()
    for junk in (-math.inf, math.inf, math.nan):
        bad_old, bad_ref = old.masked_fill(~mask, junk), ref.masked_fill(~mask, junk)
        dirty = logps.clone().requires_grad_()
        grpo_loss(dirty, bad_old, bad_ref, advantages, mask, weights, o).loss.backward()
        assert torch.equal(clean.grad, dirty.grad)


def test_everything_masked_is_a_zero_loss_with_zero_gradient():
    logps, old, ref, advantages, mask = batch()
    nothing = torch.zeros_like(mask)
    for loss_type in LOSS_TYPES:
        leaf = logps.clone().requires_grad_()
        weights, o = token_weights(nothing, loss_type, 9), Objective(loss_type=loss_type)
        loss = grpo_loss(leaf, old, ref, advantages, nothing, weights, o, factor=torch.ones_like(logps)).loss
        loss.backward()
        assert loss.item() == 0 and leaf.grad.abs().max() == 0


def test_clip_counts():
    logps = torch.zeros(1, 4)
    old = -torch.tensor([[0.5, -0.5, 0.5, -0.5]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    up = grpo_loss(logps, old, None, torch.tensor([1.0]), mask, mask.float(), Objective(beta=0.0))
    down = grpo_loss(logps, old, None, torch.tensor([-1.0]), mask, mask.float(), Objective(beta=0.0))
    assert up.high_clipped.tolist() == [[True, False, True, False]] and not up.low_clipped.any()
    assert down.low_clipped.tolist() == [[False, True, False, True]] and not down.high_clipped.any()


def test_advantages_of_equal_rewards_are_exactly_zero():
    result = group_advantages(torch.tensor([0.35] * 8), 8)
    assert result.values.tolist() == [0.0] * 8 and result.dead.tolist() == [True]


def test_advantages_are_per_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 9.0])
    result = group_advantages(rewards, 4)
    first = rewards[:4].sub(0.5) / (rewards[:4].std() + 1e-4)
    torch.testing.assert_close(result.values[:4], first)
    torch.testing.assert_close(result.values[4:], (rewards[4:] - 6) / (rewards[4:].std() + 1e-4))
    none = group_advantages(rewards, 4, "none").values
    torch.testing.assert_close(none[4:], rewards[4:] - 6)
    torch.testing.assert_close(group_advantages(rewards, 4, "batch").values, none / (rewards.std() + 1e-4))


def test_a_reward_that_does_not_apply_changes_no_mean():
    nan = float("nan")
    result = group_advantages(torch.tensor([1.0, nan, 3.0, 2.0, nan, nan, nan, 1.0]), 4, "none")
    assert result.values.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert result.dead.tolist() == [False, True]


def test_decoupled_advantages_hear_a_reward_of_small_spread():
    """Summed first, a reward of 100 drowns one of 1 altogether."""
    nan = float("nan")
    per_func = torch.tensor(
        [[100.0, 0.0], [0.0, 1.0], [100.0, 1.0], [0.0, 0.0], [7.0, 2.0], [7.0, 2.0], [7.0, nan], [7.0, 2.0]]
    )
    result = decoupled_advantages(per_func, torch.tensor([1.0, 2.0]), 4)
    z = lambda x: (x - x.mean()) / (x.std() + 1e-4)
    total = torch.cat([z(per_func[:4, 0]) + 2 * z(per_func[:4, 1]), torch.zeros(4)])
    torch.testing.assert_close(result.values, z(total), rtol=1e-5, atol=1e-6)
    assert result.dead.tolist() == [False, True] and result.values[4:].tolist() == [0.0] * 4


def test_decoupled_advantages_of_what_cannot_be_scored():
    nan = float("nan")
    per_func = torch.tensor([[1.0, nan], [nan, nan], [3.0, 5.0], [2.0, 6.0]])
    result = decoupled_advantages(per_func, torch.tensor([1.0, 1.0]), 4)
    assert result.values[1] == 0 and result.values.isfinite().all() and not result.dead.any()
    others = result.values[[0, 2, 3]]
    torch.testing.assert_close(others.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(others.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    alone = decoupled_advantages(torch.full((4, 2), nan), torch.tensor([1.0, 1.0]), 4)
    assert alone.values.tolist() == [0.0] * 4 and alone.dead.tolist() == [True]


def test_k1_as_a_loss_has_no_expected_gradient_but_k2_has():
    """Over all tokens of a softmax, weighted by their probability (Schulman 2020; Tang & Munos 2025)."""
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(9, dtype=torch.float64), 0)
    mask = torch.ones(1, 9, dtype=torch.bool)
    expected = {}
    for estimator in ("k1", "k2"):
        logp = torch.log_softmax(logits, 0)
        kl = kl_divergence(logp[None], ref[None], mask, estimator)[0]
        (expected[estimator],) = torch.autograd.grad((logp.detach().exp() * kl).sum(), logits)
    logp = torch.log_softmax(logits, 0)
    (true,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits)
    assert expected["k1"].abs().max() < 1e-12
    torch.testing.assert_close(expected["k2"], true)
