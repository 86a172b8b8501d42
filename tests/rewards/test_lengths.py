from __future__ import annotations

import math
import pickle

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards import (
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    len_reward,
)

RIGHT, WRONG = r"\boxed{5}", r"\boxed{4}"


def padded(text, length):
    return text + " " * (length - len(text))


def test_len_prefers_the_short_and_never_pays_for_the_wrong():
    replies = [padded(RIGHT, 10), padded(RIGHT, 30), padded(WRONG, 10), padded(WRONG, 20), padded(WRONG, 30)]
    assert len_reward(replies, ["5"] * 5) == [0.5, -0.5, 0.0, 0.0, -0.5]
    assert len_reward(replies[:1] * 2, ["5"] * 2) == [0.0, 0.0], "all as long"
    assert len_reward([padded("a", 10), padded("b", 30)], answer=["words"] * 2) == [0.5, -0.5], "unread: right"
    with pytest.raises(UserError, match="'len_reward' needs a column"):
        len_reward(replies)


def test_len_compares_the_replies_to_one_prompt():
    replies = [padded(RIGHT, 10), padded(RIGHT, 20), padded(RIGHT, 100), padded(RIGHT, 300)]
    assert len_reward(replies, ["5"] * 4, prompts=["a", "a", "b", "b"]) == [0.5, -0.5, 0.5, -0.5]
    chats = [[{"role": "user", "content": text}] for text in "aabb"]
    assert len_reward(replies, ["5"] * 4, prompts=chats) == [0.5, -0.5, 0.5, -0.5]
    assert len_reward(replies, ["5"] * 4)[2] == pytest.approx(0.5 - 90 / 290)


@pytest.mark.parametrize("length", [0, 7, 50, 100, 101, 5000])
def test_cosine_by_tokens_is_trls(length):
    oracle = pytest.importorskip("trl.rewards").get_cosine_scaled_reward
    values = {"min_value_wrong": -2.0, "max_value_wrong": -0.25, "min_value_correct": 0.1, "max_value_correct": 3.0}
    given = ([[{"content": text}] for text in (RIGHT, WRONG, RIGHT)], ["5", "5", "words"], [[1] * length] * 3)
    wanted = oracle(max_len=100, **values)(*given)
    assert get_cosine_scaled_reward(max_len=100, **values)(*given) == [
        None if value is None else pytest.approx(value) for value in wanted
    ]


def test_cosine_by_characters_stays_where_it_is_beyond_max_len():
    reward = get_cosine_scaled_reward(max_len=100, unit="characters")
    replies = [padded(text, length) for length in (25, 100, 200) for text in (RIGHT, WRONG)]
    slope = 0.5 * (1 + math.cos(math.pi / 4))
    wanted = [0.5 + 0.5 * slope, -0.5 - 0.5 * slope, 0.5, -0.5, 0.5, -0.5]
    assert reward(replies, ["5"] * 6, completion_ids=[[1]] * 6) == pytest.approx(wanted)
    assert get_cosine_scaled_reward(max_len=100)(replies, ["5"] * 6) == pytest.approx(wanted), "no ids: characters"
    assert reward.full_marks == 1.0 and reward.__name__ == "cosine_scaled_reward"


def test_repetition_by_tokens_is_trls():
    ids = [[1, 2, 1, 2, 1, 2], [5] * 5, [1], [], [1, 2, 3, 4]]
    oracle = pytest.importorskip("trl.rewards").get_repetition_penalty_reward
    for size in (1, 2, 3):
        ours, theirs = get_repetition_penalty_reward(size, -2.0), oracle(size, -2.0)
        assert ours(ids) == theirs(ids) == ours(completions=["a a a"] * 5, completion_ids=ids)


def test_repetition_by_words():
    reward = get_repetition_penalty_reward(2, -1.0, unit="words")
    replies = ["a b A B", "a b c", "a", "", "x x x x x"]
    wanted = pytest.approx([-1 / 3, 0, 0, 0, -0.75])
    assert reward(replies) == wanted and reward(replies, completion_ids=[[1, 1, 1]] * 5) == wanted
    assert get_repetition_penalty_reward(2, -1.0)([[{"content": text}] for text in replies]) == wanted


def test_soft_overlong_is_trls_and_dapos():
    oracle = pytest.importorskip("trl.rewards").get_soft_overlong_punishment
    ids = [[1] * n for n in (0, 79, 80, 81, 90, 100, 101)]
    assert get_soft_overlong_punishment(100, 20)(ids) == [0, 0, 0, -0.05, -0.5, -1, -1] == oracle(100, 20)(ids)
    assert get_soft_overlong_punishment(100, 0)(completion_ids=ids) == [0.0] * 6 + [-1.0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: get_cosine_scaled_reward(0), "max_len 0 should be above 0"),
        (lambda: get_cosine_scaled_reward(unit="character"), "did you mean 'characters'"),
        (lambda: get_repetition_penalty_reward(2, 0.5), "max_penalty 0.5 should not be positive"),
        (lambda: get_repetition_penalty_reward(0), "ngram_size 0 should be at least 1"),
        (lambda: get_repetition_penalty_reward(language="fr"), "language 'fr' is not known"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_tokens_need_ids():
    with pytest.raises(UserError, match="'cosine_scaled_reward' counts tokens, but no completion_ids"):
        get_cosine_scaled_reward(unit="tokens")([RIGHT], ["5"])


def test_they_can_be_pickled():
    for reward in (get_cosine_scaled_reward(9), get_repetition_penalty_reward(), get_soft_overlong_punishment(9, 3)):
        assert pickle.loads(pickle.dumps(reward)) == reward
