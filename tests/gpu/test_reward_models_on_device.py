"""Reward models in host memory, on the card while they score."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers import LlamaForSequenceClassification

from lowvram_grpo.policy.visitor import Visitor
from lowvram_grpo.rewards.model import RewardModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TEXTS = ["a b c 1 2", "d", "e f g", "h 4", "i"] * 3


def judge(place):
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config)
    model.score.weight = torch.nn.Parameter(torch.linspace(-1, 1, config.hidden_size)[None])
    return RewardModel(model, make_tokenizer(), "cuda", place, Visitor)


@pytest.mark.parametrize("place", ["cuda", "in_turn", "cpu"])
def test_scores_are_the_same_wherever_it_is_kept(place):
    expected = judge("cpu")([""] * len(TEXTS), TEXTS)
    moved = judge(place)
    for _ in range(2):
        assert moved([""] * len(TEXTS), TEXTS) == pytest.approx(expected, abs=1e-3)
        kept = {p.device.type for p in moved.model.parameters()}
        assert kept == ({"cuda"} if place == "cuda" else {"cpu"})
    # In the middle of a run, when memory runs out.
    moved.place("in_turn")
    assert moved([""] * len(TEXTS), TEXTS) == pytest.approx(expected, abs=1e-3)
    assert {p.device.type for p in moved.model.parameters()} == {"cpu"}
