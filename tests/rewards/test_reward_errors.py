"""What becomes of a reward function that fails or takes its time: `reward_errors`, `reward_timeout`."""

from __future__ import annotations

import threading
import time

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards import calls
from lowvram_grpo.rewards.runner import HOPELESS, RewardRunner

COMPLETIONS = ["a", "bb", "ccc"]


def length(completions, **kwargs):
    return [len(c) for c in completions]


def score(*funcs, columns=None, runner=None, **settings):
    runner = runner or RewardRunner(list(funcs), **settings)
    return runner(["p"] * 3, COMPLETIONS, [[1, 2]] * 3, columns or {}, None)


# What it waits for


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_who_is_waited_for_is_said(monkeypatch, kind):
    monkeypatch.setattr(calls, "PATIENCE_SECONDS", 0.1)

    def slow(completions, **kwargs):
        time.sleep(0.5)
        return [0, 0, 0]

    async def slow_async(completions, **kwargs):
        return slow(completions)

    said = []
    score(slow if kind == "sync" else slow_async, tell=said.append)
    assert said and all("waiting for the reward function 'slow" in s and "--reward-timeout" in s for s in said)
    assert len(said) <= 3  # after 0.1, 0.2, 0.4 s


# Going on in spite of errors


def one_breaks(completions, log_extra, log_metric, **kwargs):
    if "bb" in completions:
        raise ValueError("bb")
    log_extra("size", [len(c) for c in completions])
    log_metric("calls", 1)
    return [float(len(c)) for c in completions]


async def one_breaks_async(completions, log_extra, log_metric, **kwargs):
    return one_breaks(completions, log_extra, log_metric)


@pytest.mark.parametrize("func", [one_breaks, one_breaks_async])
@pytest.mark.parametrize("timeout", [None, 10])
def test_what_fails_is_none_and_is_counted_and_said_once(func, timeout):
    said = []
    runner = RewardRunner([func, length], errors="none", tell=said.append, timeout=timeout)
    for _ in range(2):
        result = score(runner=runner, columns={"answer": ["x", "y", "z"]})
        assert result.per_func[:, 0].isnan().tolist() == [False, True, False]
        assert result.total.tolist() == [2, 2, 6]
        assert result.metrics == {
            f"rewards/{func.__name__}/failed": 1.0, "rewards/length/failed": 0.0, "calls": 1.0
        }  # fmt: skip
        assert result.extras == {"size": [1, None, 3]}
    assert len(said) == 1 and "raised ValueError: bb" in said[0] and "None there" in said[0]


def test_a_bad_number_is_none_without_a_second_call():
    asked = []

    def nan(completions, **kwargs):
        asked.append(len(completions))
        return [1.0, float("nan"), "2"]

    result = score(nan, errors="none")
    assert result.per_func[:, 0].isnan().tolist() == [False, True, True]
    assert asked == [3] and result.metrics == {"rewards/nan/failed": 2.0}


def test_what_took_too_long_is_not_asked_again_and_the_next_batch_is():
    free, asked = threading.Event(), []

    async def hangs(completions, **kwargs):
        asked.append(len(completions))
        if len(asked) == 1:
            free.wait(20)  # blocks its loop, too
        return [1, 1, 1]

    runner = RewardRunner([hangs], errors="none", timeout=0.5)
    assert score(runner=runner).metrics == {"rewards/hangs/failed": 3.0}
    assert score(runner=runner).total.tolist() == [1, 1, 1]
    free.set()
    assert asked == [3, 3]


def test_one_that_always_fails_ends_the_run_all_the_same():
    def broken(completions, **kwargs):
        raise KeyError("x")

    runner = RewardRunner([broken, length], errors="none")
    for _ in range(HOPELESS - 1):
        score(runner=runner)
    with pytest.raises(UserError, match=f"raised KeyError.*on every completion of {HOPELESS} batches in a row"):
        score(runner=runner)


def test_a_missing_column_is_no_failure_to_go_on_after():
    def needs(completions, answer):
        return [0, 0, 0]

    with pytest.raises(UserError, match="needs 'answer'"):
        score(needs, errors="none")
