"""The numbers of an evaluation: pass@k, intervals, paired differences, and what a pass over the data collects."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import Quiet, digit_share

from lowvram_grpo.errors import UserError
from lowvram_grpo.jobs.evaluation import Interval, Scored, all_or_nothing, default_threshold, evaluate, pass_at_k
from lowvram_grpo.memory.guard import Guard
from lowvram_grpo.rewards.registry import BUILTIN, TEMPLATE_REWARDS, full_marks
from lowvram_grpo.rewards.runner import RewardRunner
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.training.collect import Collector


def scored(rewards, *, per_func=None, truncated=None, lengths=None, names=("right",)):
    rewards = torch.tensor(rewards)
    per_func = rewards[:, :, None] if per_func is None else torch.tensor(per_func)
    zeros = torch.zeros(rewards.shape)
    return Scored(list(names), rewards, per_func, zeros.bool() if truncated is None else torch.tensor(truncated),
                  zeros.long() if lengths is None else torch.tensor(lengths), 1.0)  # fmt: skip


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_equals_the_share_of_all_draws_of_k_that_hold_a_pass(samples):
    for passed in range(samples + 1):
        outcomes = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(outcomes, k))
            assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_unbiased():
    """Over all outcomes of n tries that pass with probability p, its mean is 1 - (1 - p)^k."""
    n, k, p = 6, 3, 0.3
    chance = lambda c: math.comb(n, c) * p**c * (1 - p) ** (n - c)
    assert sum(chance(c) * pass_at_k(n, c, k) for c in range(n + 1)) == pytest.approx(1 - (1 - p) ** k)


def test_an_interval_is_over_prompts_and_leaves_out_what_does_not_apply():
    found = Interval.of(torch.tensor([1.0, 2.0, float("nan"), 3.0]))
    half = 1.959964 * 1.0 / math.sqrt(3)
    assert found.prompts == 3 and found.mean == 2.0
    assert (found.low, found.high, found.half) == pytest.approx((2 - half, 2 + half, half))
    assert Interval.of(torch.tensor([4.0])) == (4.0, None, None, 1)
    assert math.isnan(Interval.of(torch.tensor([float("nan")])).mean)


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = (torch.rand(2000, 60, generator=generator) < 0.4).float()
    covered = sum(i.low <= 0.4 <= i.high for i in map(Interval.of, draws)) / len(draws)
    assert 0.92 < covered < 0.97


def test_a_pass_is_a_total_of_the_threshold_or_more():
    sum_in_float32 = float(torch.tensor(0.7) + torch.tensor(0.9))
    assert torch.tensor(sum_in_float32) < default_threshold([0.7, 0.9], [1.0, 1.0])
    one = scored([[sum_in_float32, 1.5, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])
    values = one.per_prompt([1, 2, 4], default_threshold([0.7, 0.9], [1.0, 1.0]))
    assert values["pass@1"].tolist() == pytest.approx([0.25, 0.0])
    assert values["pass@2"].tolist() == pytest.approx([0.5, 0.0])
    assert values["pass@4"].tolist() == pytest.approx([1.0, 0.0])


def test_a_prompt_to_which_no_reward_applies_counts_in_no_mean():
    nan = float("nan")
    found = scored([[nan, nan], [1.0, 0.0], [1.0, nan]]).summary([1], 1.0)
    assert (found["reward"].mean, found["reward"].prompts) == (0.75, 2)
    assert (found["pass@1"].mean, found["pass@1"].prompts) == (0.5, 2)
    assert found["frac_reward_zero_std"].mean == pytest.approx(2 / 3)
    assert (found["reward_std"].mean, found["reward_std"].prompts) == (pytest.approx(math.sqrt(0.5)), 1)


def test_the_spread_within_groups_is_that_of_training():
    from lowvram_grpo.objective import group_advantages

    rewards = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    rewards[2] = 0.35
    values = scored(rewards.tolist()).per_prompt([1], 1.0)
    training = group_advantages(rewards.flatten(), 4)
    assert values["frac_reward_zero_std"].tolist() == training.dead.float().tolist() == [0, 0, 1, 0, 0, 0]
    expected = training.std.view(6, 4)[:, 0]
    torch.testing.assert_close(values["reward_std"], torch.where(training.dead, 0.0, expected))


def test_a_greedy_pass_has_no_spread():
    assert not {"reward_std", "frac_reward_zero_std"} & scored([[1.0], [0.0]]).summary([1], 1.0).keys()


def test_a_difference_is_paired_by_prompt():
    """Prompts that differ a lot, and a gain that is the same on each: no interval of either mean could show it."""
    base = torch.arange(20.0)[:, None]
    gained = scored((base + 0.5).tolist()).minus(scored(base.tolist()), [1], 1.0)["reward"]
    assert gained.mean == pytest.approx(0.5) and gained.half == pytest.approx(0.0, abs=1e-9)
    assert Interval.of(base[:, 0]).half > 2


def test_the_usual_threshold_is_full_marks_from_every_reward():
    assert default_threshold([1.0], [1.0]) == 1.0 and default_threshold([1.0, 0.5, -2.0], [1.0, 5.0, 1.0]) == 3.5
    with pytest.raises(UserError, match="--threshold"):
        default_threshold([-1.0], [1.0])
    ones = scored([[0.0, 1.0], [float("nan"), 1.0]])
    assert all_or_nothing(ones, [1.0]) and not all_or_nothing(ones, [5.0])


def test_the_best_completions_get_what_full_marks_say():
    answer, inside = ["four words are here"], [[{"role": "assistant", "content": "<answer>one</answer>"}]]
    tags = [BUILTIN[name] for name in TEMPLATE_REWARDS["tldr"]]
    assert [f(completions=inside, answer=answer)[0] for f in tags] == [full_marks(f) for f in tags] == [5, 10, 5]
    assert full_marks(digit_share) == full_marks("owner/reward-model") == full_marks(BUILTIN["accuracy"]) == 1


@pytest.fixture
def collector(model, tokenizer):
    sampling = Sampling(max_new_tokens=5, eos_ids=(1,), pad_id=0)
    guard = Guard({}, lambda key, value: None, tell=Quiet().notice, limits="", active=False)
    return Collector(
        RolloutEngine(model, sampling, 3), RewardRunner([digit_share]), tokenizer, guard, max_prompt_length=None,
        chat_template_kwargs=None, scale_rewards="none", only_prompts=False, tell=lambda phase: None,
    )  # fmt: skip


def run(collector, dataset, group, *, sampling=None, a_call=8, seed=0):
    rollouts = []
    found = evaluate(
        collector,
        dataset,
        group,
        sampling=sampling or collector.engine.sampling,
        seed=seed,
        completions_a_call=a_call,
        seen=lambda first, rollout: rollouts.append((first, rollout)),
    )
    return found, rollouts


def test_a_pass_sees_every_prompt_once_in_order(collector, dataset):
    found, rollouts = run(collector, dataset, 3, a_call=8)
    assert [first for first, _ in rollouts] == [0, 2, 4, 6, 8, 10]
    assert [p for _, r in rollouts for p in r.prompts] == [p for p in dataset["prompt"] for _ in range(3)]
    expected = digit_share([c for _, r in rollouts for c in r.completions])
    assert found.rewards.flatten().tolist() == pytest.approx(expected) and found.per_func.shape == (12, 3, 1)
    assert found.lengths.flatten().tolist() == [len(i) for _, r in rollouts for i in r.batch.completion_ids]
    assert found.truncated.flatten().tolist() == [t for _, r in rollouts for t in r.batch.truncated]


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_waves(collector, dataset):
    first, _ = run(collector, dataset, 4)
    collector.engine.rows = 1
    again, _ = run(collector, dataset, 4)
    other, _ = run(collector, dataset, 4, seed=1)
    assert torch.equal(first.rewards, again.rewards) and not torch.equal(first.rewards, other.rewards)


def test_equal_prompts_get_different_completions_in_every_call(collector, dataset):
    _, rollouts = run(collector, dataset.select([4] * 6), 2, a_call=2)
    drawn = [tuple(ids) for _, rollout in rollouts for ids in rollout.batch.completion_ids]
    assert len(rollouts) == 6 and len(set(drawn)) > 9


def test_the_sampling_of_a_pass_replaces_the_engines(collector, dataset):
    greedy = Sampling(max_new_tokens=3, eos_ids=(1,), pad_id=0, temperature=0.0)
    _, rollouts = run(collector, dataset, 2, sampling=greedy)
    for _, rollout in rollouts:
        ids = rollout.batch.completion_ids
        assert ids[::2] == ids[1::2] and max(map(len, ids)) <= 3
