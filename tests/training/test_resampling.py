"""Dead groups give way to groups of other prompts, what that cost is said, and what is kept is one rollout."""

from __future__ import annotations

import pytest
import torch
from conftest import Quiet, make_model
from datasets import Dataset
from peft import LoraConfig

from lowvram_grpo import GRPOConfig, GRPOTrainer
from lowvram_grpo.errors import UserError
from lowvram_grpo.objective import group_advantages
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.training.collect import rollout_seed
from lowvram_grpo.training.experience import Rollout
from lowvram_grpo.training.resampling import Resampling, other_prompts, round_seed

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
DEAD = {"a", "a b", "c", "c d"}  # prompts whose completions all get the same reward


def length_unless_dead(prompts, completions, completion_ids, **kwargs):
    return [1.0 if p in DEAD else sum(ids) / 100 for p, ids in zip(prompts, completion_ids)]


def data(live=8):
    prompts = sorted(DEAD) + [" ".join("efghijkl"[: i + 1]) for i in range(live)]
    return Dataset.from_dict({"prompt": prompts, "number": list(range(len(prompts)))})


def trained(config, tokenizer, dataset, reward=length_unless_dead, steps=3, cls=GRPOTrainer, **settings):
    args = config(
        max_steps=steps, prompts_per_step=4, per_device_train_batch_size=16, logging_steps=1, log_completions=True,
        **settings,
    )  # fmt: skip
    trainer = cls(make_model(), reward, args, dataset, processing_class=tokenizer, peft_config=LORA, observer=Quiet())
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("signal", [True, False])
def test_a_step_learns_from_live_groups_and_says_what_they_cost(config, tokenizer, signal):
    """Whether or not step 1's rollout has been made before it, to be looked at."""
    trained_on = []

    class Watched(GRPOTrainer):
        def _record(self, rollout):
            trained_on.append(rollout)
            super()._record(rollout)

    trainer, rows = trained(
        config, tokenizer, data(), resample_dead_groups=8, signal_check=signal, self_test=False, cls=Watched
    )
    assert all(row["frac_reward_zero_std"] == row["resample/dead_left"] == 0 for row in rows)
    assert any(row["resample/dead_before"] for row in rows)
    for row in rows:
        assert (row["resample/rounds"] > 0) == (row["resample/dead_before"] > 0)
        assert row["resample/groups_drawn"] >= row["resample/dead_before"]
        assert (row["resample/tokens_dropped"] > 0) == (row["resample/rounds"] > 0)
    for rollout in trained_on:
        assert len(rollout.completions) == len(rollout.batch.completion_ids) == len(rollout.rewards) == 16
        assert not DEAD & set(rollout.prompts)
        groups = [rollout.prompts[i : i + 4] for i in range(0, 16, 4)]
        assert all(len(set(group)) == 1 for group in groups) and len({group[0] for group in groups}) == 4
        for prompt, ids in zip(rollout.prompts, rollout.batch.prompt_ids):
            assert tokenizer.convert_ids_to_tokens(ids) == prompt.split()
        torch.testing.assert_close(
            rollout.rewards, torch.tensor([sum(ids) / 100 for ids in rollout.batch.completion_ids])
        )
        mean = rollout.rewards.view(4, 4).mean(1, keepdim=True)
        assert torch.equal(rollout.advantages.values.view(4, 4) > 0, rollout.rewards.view(4, 4) > mean)
    assert sum(" dropped, " in text for text in trainer.observer.said) == 1
    seen = sum(rollout.tokens for rollout in trained_on) + sum(row["resample/tokens_dropped"] for row in rows)
    assert rows[-1]["num_tokens"] == seen


def test_without_it_dead_groups_stay_and_nothing_is_said(config, tokenizer):
    trainer, rows = trained(config, tokenizer, data())
    assert any(row["frac_reward_zero_std"] for row in rows) and not any("resample/rounds" in row for row in rows)
    assert not any(" dropped, " in text for text in trainer.observer.said)


def test_where_all_prompts_are_dead_it_ends_and_a_step_keeps_its_groups(config, tokenizer):
    dataset = data(live=0).select(range(4))
    _, rows = trained(config, tokenizer, dataset, resample_dead_groups=5, steps=1)
    assert rows[0]["resample/dead_left"] == 4 and rows[0]["resample/rounds"] == 0  # there are no other prompts
    dataset = Dataset.from_dict({"prompt": [f"{p} {q}" for p in "abcd" for q in "efg"]})
    for value in (0.5, None):  # what nothing judged is dead too
        flat = lambda completions, value=value, **kwargs: [value] * len(completions)
        _, rows = trained(config, tokenizer, dataset, flat, resample_dead_groups=2, steps=1)
        assert rows[0]["resample/rounds"] == 2 and rows[0]["resample/groups_drawn"] == 8
        assert rows[0]["resample/dead_left"] == 4


def test_evaluation_is_left_alone(config, tokenizer):
    trainer, _ = trained(config, tokenizer, data(), resample_dead_groups=3, steps=1)
    metrics = trainer.evaluate(data().select(range(4)))
    assert metrics["eval_frac_reward_zero_std"] == 1.0 and not any("resample" in name for name in metrics)


def test_what_is_not_of_one_kept_group_is_a_mean_over_all_that_were_sampled(config, tokenizer):
    """A round of few groups weighs by them, and a name that the first rollout alone has logged is not lost."""
    calls = []

    def reward(prompts, completion_ids, log_metric, **kwargs):
        calls.append(len(prompts) // 4)
        log_metric("call", len(calls))
        if len(calls) == 1:
            log_metric("first", 7.0)
        return length_unless_dead(prompts, None, completion_ids)

    _, rows = trained(config, tokenizer, data(), reward, resample_dead_groups=8, steps=1, signal_check=False)
    assert len(calls) > 1 and sum(calls) == 4 + rows[0]["resample/groups_drawn"]
    mean = sum((i + 1) * groups for i, groups in enumerate(calls)) / sum(calls)
    assert rows[0]["call"] == pytest.approx(mean) and rows[0]["first"] == 7.0


@pytest.mark.parametrize("signal", [True, False])
def test_a_subclass_sees_the_rows_that_came_instead(config, tokenizer, signal):
    """And its advantages are those of every step, the one whose rollout was looked at before included."""
    given, used = [], []

    class Mine(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            outputs = super()._generate_and_score_completions(inputs)
            for row, ids, mask in zip(inputs, outputs["prompt_ids"], outputs["prompt_mask"]):
                assert tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist()) == row["prompt"].split()
                assert not self.is_in_train or row["prompt"] not in DEAD
            outputs["advantages"] = torch.tensor([float(row["number"]) for row in inputs])
            given.append([row["number"] for row in inputs])
            return outputs

        def _record(self, rollout):
            used.append(rollout.advantages.values.tolist())
            super()._record(rollout)

    _, rows = trained(config, tokenizer, data(), resample_dead_groups=8, signal_check=signal, self_test=False, cls=Mine)
    assert any(row["resample/dead_before"] for row in rows)
    assert rows[0]["resample/dead_before"] > 0  # in the step that the signal check has looked at
    assert used == given[-3:] and not any(row.get("resample/dead_left") for row in rows)


def test_an_evaluation_before_step_1_is_not_taken_for_its_rollout(config, tokenizer):
    def reward(prompts, completion_ids, trainer_state, log_metric, **kwargs):
        log_metric("prompts", len(prompts))
        return length_unless_dead(prompts, None, completion_ids)

    args = {"eval_strategy": "steps", "eval_steps": 50, "eval_on_start": True, "per_device_eval_batch_size": 4}
    trainer = GRPOTrainer(
        make_model(), reward,
        config(max_steps=1, prompts_per_step=4, per_device_train_batch_size=16, resample_dead_groups=1, **args),
        data(), data().select(range(1)), processing_class=tokenizer, peft_config=LORA, observer=Quiet(),
    )  # fmt: skip
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    groups = 4 + row["resample/groups_drawn"]
    assert row["prompts"] == pytest.approx((16 * 4 + (4 * row["resample/groups_drawn"]) * (groups - 4)) / groups)


def test_masks_of_inserted_tokens_are_kept_where_a_round_has_none():
    def rollout(prompts, ids, rewards, mask):
        batch = RolloutBatch([[0]] * len(ids), ids, [torch.zeros(len(row)) for row in ids], [False] * len(ids), mask)
        rewards = torch.tensor(rewards)
        return Rollout(batch, prompts, prompts, rewards, rewards[:, None], group_advantages(rewards, 2), {})

    ids, mask = [[1, 2, 3], [4, 5], [6], [7, 8]], [[1, 0, 1], [1, 0], [1], [1, 0]]
    masked = rollout(list("aabb"), ids, [0.0, 1.0, 1.0, 1.0], mask)
    fresh = rollout(list("cc"), [[1, 2, 3], [4, 5]], [0.0, 1.0], None)
    advantages = lambda total, per_func, size: group_advantages(total, size)
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    resample = Resampling(1, [{"prompt": "c"}], lambda rows, seed: (fresh, {}), advantages)
    found, rows, *_ = resample(masked, rows, {}, 3)
    assert [row["prompt"] for row in rows] == ["a", "c"]
    assert found.batch.tool_mask == [[1, 0, 1], [1, 0], [1, 1, 1], [1, 1]]


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_its_seeds_are_of_no_rollout_and_no_epoch(seed):
    steps = {rollout_seed(seed, step) for step in range(-500, 5000)} | {seed + epoch for epoch in range(5000)}
    rounds = [round_seed(rollout_seed(seed, step), n) for step in range(2000) for n in range(9)]
    assert len(set(rounds)) == len(rounds) and not steps & set(rounds) and 0 <= min(rounds) < max(rounds) < 2**63


def test_other_prompts_are_each_once_in_an_order_of_their_own():
    rows = [{"prompt": f"p{i}"} for i in range(20)]
    drawn = [row["prompt"] for row in other_prompts(rows, 7, rows[:5])]
    assert sorted(drawn) == sorted(f"p{i}" for i in range(5, 20))
    assert drawn == [row["prompt"] for row in other_prompts(rows, 7, rows[:5])]
    assert drawn != [row["prompt"] for row in other_prompts(rows, 8, rows[:5])]


def test_a_negative_number_of_rounds_is_refused(tmp_path):
    with pytest.raises(UserError, match="resample_dead_groups"):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, resample_dead_groups=-1)


def test_a_stream_is_refused(config, tokenizer):
    dataset = Dataset.from_dict({"prompt": ["a", "b", "c", "d"]})
    with pytest.raises(UserError, match="is a stream"):
        trained(config, tokenizer, dataset.to_iterable_dataset(), **{"resample_dead_groups": 1})
