"""Where a reward model is kept, and what happens when memory runs out."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer
from test_model import COMPLETIONS, PROMPTS, make_judge

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ladder import IN_TURN, REWARD, Rung, next_rung, relieves, saves
from lowvram_grpo.policy.visitor import Visitor
from lowvram_grpo.rewards import model as module
from lowvram_grpo.rewards.model import ROWS, RewardModel


def judge_at(place, device="cpu"):
    return RewardModel(make_judge(), make_tokenizer(), device, place, Visitor)


def test_every_place_gives_the_same_scores_on_a_cpu():
    scores = [judge_at(place)(PROMPTS, COMPLETIONS) for place in ("auto", "cuda", "cpu", "in_turn")]
    assert all(score == scores[0] for score in scores)


def test_in_turn_its_numbers_leave_the_host_for_a_moment_and_are_the_same_after():
    judge = judge_at("in_turn", "meta")  # stands for a card: there are no numbers there
    before = {name: p.clone() for name, p in judge.model.named_parameters()}
    assert {p.device.type for p in judge.model.parameters()} == {"cpu"}
    with judge._there:
        assert {p.device.type for p in judge.model.parameters()} == {"meta"}
        assert {b.device.type for b in judge.model.buffers()} == {"meta"}
    for name, p in judge.model.named_parameters():
        assert torch.equal(p, before[name])
    judge.place("cpu")
    assert judge(PROMPTS, COMPLETIONS) == judge_at("cpu")(PROMPTS, COMPLETIONS)
    # What is kept in turn lies in one piece of host memory, tied weights once.
    assert judge_at("cpu", "meta").device.type == "cpu" and judge_at("cuda", "meta").device.type == "meta"


def test_it_takes_fewer_rows_when_memory_runs_out(monkeypatch):
    judge, sizes = judge_at("cpu"), []
    forward = judge.model.forward

    def tight(**batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**batch)

    monkeypatch.setattr(judge.model, "forward", tight)
    scores = judge(PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(judge_at("cpu")(PROMPTS, COMPLETIONS), abs=1e-5)
    assert sizes[:3] == [ROWS, ROWS // 2, ROWS // 4] and set(sizes[3:]) == {2}


def test_where_one_row_is_too_much_it_says_what_would_help(monkeypatch):
    judge = judge_at("cpu")

    def never(**batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(judge.model, "forward", never)
    with pytest.raises(UserError, match=r"while the reward model .* scores one completion; .*--reward-model-device"):
        judge(PROMPTS, COMPLETIONS)


def test_auto_waits_in_host_memory_where_the_card_has_no_room(monkeypatch):
    moved = module.RewardModel.place

    def full(self, place):
        if place == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        moved(self, place)

    monkeypatch.setattr(module.RewardModel, "place", full)
    assert judge_at("auto", "meta")._there.device
    with pytest.raises(torch.OutOfMemoryError):
        judge_at("cuda", "meta")


def test_reward_models_leave_the_card_before_anything_else_is_lowered():
    settings = {"reward_model_device": "auto", "rollout_batch_size": 8, "per_device_train_batch_size": 4}
    settings |= {"gradient_checkpointing": True, "activation_offload": True, "mlp_tile": 128, "workspace_mib": 8}
    settings |= {"optimizer_offload": True}
    assert next_rung("rollout", settings) == IN_TURN
    assert next_rung("rollout", {**settings, "reward_model_device": "in_turn"}) == Rung("rollout_batch_size", 4)
    del settings["reward_model_device"]  # there are none
    assert next_rung("rollout", settings) == Rung("rollout_batch_size", 4)
    assert saves("reward_model_device", "cpu", "in_turn") and not saves("reward_model_device", "in_turn", "cpu")
    assert relieves(Rung("reward_model_device", "cpu"), REWARD) and not relieves(IN_TURN, REWARD)
