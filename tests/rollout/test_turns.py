"""Conversations by an engine that keeps nothing between turns."""

from __future__ import annotations

import pytest

from lowvram_grpo import UserError
from lowvram_grpo.rollout.sampler import Sampling
from lowvram_grpo.rollout.turns import converse_anew, turn_seed
from lowvram_grpo.rollout.vllm_base import Completion, VLLMEngine


class Engine(VLLMEngine):
    """vLLM, of ten positions. A turn is `3` and an end token, as far as nobody looks at the room."""

    def __init__(self):
        super().__init__(Sampling(8, (1,), 0), None)
        self.asked = []

    def _max_model_len(self):
        return 10

    def _publish(self):
        pass

    def _complete(self, prompts, group, seeds):
        self.asked.append((prompts, self._sampling_params()["max_tokens"], seeds))
        return [[Completion([3, 1], [-0.5, -0.25], True)] * group for _ in prompts]


def test_each_turn_has_the_room_that_is_left():
    engine, told = Engine(), []

    def reply(turns):
        told.append([(turn.row, turn.ids, turn.sampled, turn.ended) for turn in turns])
        return [[7, 7] if turn.row == 1 and len(turn.ids) < 4 else None for turn in turns]

    batch = converse_anew(engine, [[5, 6]], 2, seed=4, reply=reply)
    assert [(prompts, room) for prompts, room, _ in engine.asked] == [([[5, 6]], 8), ([[5, 6, 3, 1, 7, 7]], 4)]
    assert batch.completion_ids == [[3, 1], [3, 1, 7, 7, 3, 1]] and batch.tool_mask == [[1, 1], [1, 1, 0, 0, 1, 1]]
    assert batch.sampling_per_token_logps[1].tolist() == [-0.5, -0.25, 0, 0, -0.5, -0.25]
    assert told[1] == [(1, [3, 1, 7, 7, 3, 1], [3, 1], True)] and batch.truncated == [False, False]
    assert engine.sampling.max_new_tokens == 8  # the turn's sampling was for that call alone
    with pytest.raises(UserError, match="exceed the 10 tokens"):
        engine.generate([[5] * 5], 1, seed=0)


def test_a_reply_without_room_is_left_out():
    for reply, expected, cut in (([7] * 5, [3, 1, *[7] * 5, 3, 1], False), ([7] * 6, [3, 1], True)):
        said = iter([[reply], [None]])
        batch = converse_anew(Engine(), [[5, 6]], 1, seed=0, reply=lambda turns, said=said: next(said))
        assert (batch.completion_ids, batch.truncated) == ([expected[:9]], [cut])


def test_turns_have_seeds_of_their_own():
    seeds = {turn_seed(seed, number) for seed in range(50) for number in range(1, 5)}
    assert len(seeds) == 200 and not seeds & set(range(100))
