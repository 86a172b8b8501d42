from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest
import torch

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.runner import RewardRunner
from lowvram_grpo.rewards.signatures import check_columns

COMPLETIONS = ["a", "bb", "ccc"]


def length(completions, **kwargs):
    return [len(c) for c in completions]


def only_even(completions, **kwargs):
    return [1.0 if len(c) % 2 == 0 else None for c in completions]


async def judged(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5 for _ in completions]


def score(*funcs, columns=None, state=None, **settings):
    prompts, ids = ["p"] * len(COMPLETIONS), [[1]] * len(COMPLETIONS)
    return RewardRunner(list(funcs), **settings)(prompts, COMPLETIONS, ids, columns or {}, state)


def test_weighted_sum_over_what_applies():
    result = score(length, only_even, judged, weights=[1.0, 10.0, -2.0])
    nan = torch.nan
    expected = torch.tensor([[1, nan, 0.5], [2, 1, 0.5], [3, nan, 0.5]])
    torch.testing.assert_close(result.per_func, expected, equal_nan=True, rtol=0, atol=0)
    assert result.per_func.dtype == result.total.dtype == torch.float32
    assert result.total.tolist() == [0.0, 11.0, 2.0]


def test_a_row_that_no_reward_applies_to_stays_nan():
    assert score(only_even).total.isnan().tolist() == [True, False, True]


def test_names_are_distinct_and_weights_default_to_one():
    class Judge:
        def __call__(self, completions, **kwargs):
            return length(completions)

    runner = RewardRunner([length, length, partial(length), Judge(), "label"])
    assert runner.names == ["length", "length_2", "length_3", "Judge", "label"]
    assert runner.weights.tolist() == [1.0] * 5


def test_functions_receive_columns_and_hooks_by_name():
    seen = {}

    def everything(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs)
        kwargs["log_extra"]("initial", [c[0] for c in completions])
        kwargs["log_metric"]("mean_length", 2)
        kwargs["log_metric"]("mean_length", 4)
        return [0] * len(completions)

    def picky(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer)]

    result = score(everything, picky, columns={"answer": ["a", "b", "ccc"]}, state="the state")
    assert set(seen) == {"answer", "trainer_state", "log_extra", "log_metric"}
    assert seen["trainer_state"] == "the state"
    assert result.per_func[:, 1].tolist() == [1, 0, 1]
    assert result.extras == {"initial": ["a", "b", "c"]}
    assert result.metrics == {"mean_length": 3.0}


def test_two_functions_may_log_the_same_column():
    def first(completions, log_extra):
        log_extra("note", ["x"] * 3)
        return [0] * 3

    def second(completions, log_extra):
        for c in completions:
            log_extra("note", [c])
        return [0] * 3

    assert score(first, second).extras == {"note": ["x"] * 3, "second/note": COMPLETIONS}


def test_a_function_cannot_reorder_what_the_others_see():
    def rude(completions, **kwargs):
        completions.reverse()
        return [0] * len(completions)

    assert score(rude, length).per_func[:, 1].tolist() == [1, 2, 3]


def test_async_functions_run_at_the_same_time_as_each_other_and_the_rest():
    met = threading.Barrier(3, timeout=10)

    async def meets(completions, **kwargs):
        await asyncio.to_thread(met.wait)
        return [1] * len(completions)

    def waits(completions, **kwargs):
        met.wait()
        return [1] * len(completions)

    assert score(meets, waits, meets).total.tolist() == [3, 3, 3]


def test_async_functions_keep_their_loop_and_work_inside_a_running_one():
    loops = []

    async def remembers(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0] * len(completions)

    runner = RewardRunner([remembers])

    async def notebook():
        return runner(["p"], ["c"], [[1]], {}, None)

    asyncio.run(notebook())
    asyncio.run(notebook())
    assert len(loops) == 2 and loops[0] is loops[1]


@pytest.mark.parametrize(
    "output", [torch.tensor([1.0, 2.0, 3.0]), (1, 2, 3), iter([1, 2, 3]), [True, torch.tensor(2), 3.0]]
)
def test_what_counts_as_a_list_of_numbers(output):
    def func(completions, **kwargs):
        return output

    assert score(func).total.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([1.0], "'func' returned 1 rewards for 3 completions"),
        ([1.0, float("nan"), 2.0], "'func' gave nan for row 1"),
        ([1.0, 2.0, float("inf")], "'func' gave inf for row 2"),
        ([1.0, 2.0, 1e300], r"'func' gave 1e\+300 for row 2"),
        (["5", 1.0, 1.0], "'func' gave '5' for row 0"),
        ([1.0, [1.0], 1.0], r"'func' gave \[1.0\] for row 1"),
        (2.0, "'func' returned float, not a list of 3 rewards"),
        (None, "'func' returned NoneType, not a list of 3 rewards"),
        ("abc", "'func' returned str, not a list of 3 rewards"),
    ],
)
@pytest.mark.parametrize("timeout", [None, 10])
def test_bad_output_is_named(output, message, timeout):
    def func(completions, **kwargs):
        return output

    with pytest.raises(UserError, match=message):
        score(length, func, timeout=timeout)


@pytest.mark.parametrize("timeout", [None, 10])
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("error", [KeyError("colour"), TimeoutError("their server")])
def test_an_exception_is_named_with_its_place(kind, error, timeout):
    def breaks(completions, **kwargs):
        raise error

    async def breaks_async(completions, **kwargs):
        raise error

    func = breaks if kind == "sync" else breaks_async
    with pytest.raises(UserError) as caught:
        score(length, func, timeout=timeout)
    assert f"{func.__name__!r} raised {type(error).__name__}: {error} (test_runner.py, line " in str(caught.value)


def test_an_interrupt_is_not_taken_for_a_failure():
    def interrupted(completions, **kwargs):
        raise KeyboardInterrupt

    for timeout in (None, 10):
        with pytest.raises(KeyboardInterrupt):
            score(interrupted, timeout=timeout)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hang_ends_at_the_timeout(kind):
    released = threading.Event()

    def hangs(completions, **kwargs):
        released.wait(20)

    async def hangs_async(completions, **kwargs):
        await asyncio.sleep(20)

    start = time.monotonic()
    with pytest.raises(UserError, match=r"'hangs(_async)?' did not finish within 0.3 s; .*--reward-timeout"):
        score(hangs if kind == "sync" else hangs_async, timeout=0.3)
    released.set()
    assert time.monotonic() - start < 5


def test_missing_columns_are_named_with_those_found():
    def needs(completions, answer, label):
        return [0] * len(completions)

    with pytest.raises(
        UserError, match=r"'needs' needs 'answer', 'label', which the data lacks; columns found: a, b \("
    ):
        score(needs, columns={"b": [1] * 3, "a": [1] * 3})


def test_columns_are_checked_without_a_call():
    def called(completions, answer):
        raise AssertionError

    check_columns([called, "label", "accuracy", "org/reward-model", max], ["answer"])
    with pytest.raises(UserError, match="'called' needs 'answer', which the data lacks; columns found: other"):
        check_columns([called], ["other"])
    with pytest.raises(UserError, match="'accuracy' needs a column `answer` or `solution`"):
        check_columns(["label", "accuracy"], [])


def test_extras_of_the_wrong_length_are_named():
    def func(completions, log_extra):
        log_extra("note", ["x"])
        return [0] * len(completions)

    with pytest.raises(UserError, match="'func' gave log_extra 1 values of 'note' for 3 completions"):
        score(func)


@pytest.mark.parametrize(
    ("funcs", "settings", "message"),
    [
        ([], {}, "no reward function"),
        ([length], {"weights": [1.0, 2.0]}, r"reward weights \(2\) must match the number of reward functions \(1\)"),
        ([length], {"processing_classes": []}, r"reward processing classes \(0\) must match"),
        ([3], {}, "a reward function is 3, which can't be called"),
    ],
)
def test_settings_that_cannot_work(funcs, settings, message):
    with pytest.raises(UserError, match=message):
        RewardRunner(funcs, **settings)


def test_names_of_built_in_rewards_in_a_script():
    def fails(name, init_kwargs):
        raise UserError(f"{name} can't be loaded.")

    assert RewardRunner(["tag_count_reward", "think_format"]).names == ["tag_count_reward", "think_format_reward"]
    with pytest.raises(UserError, match=r"'acuracy' is no built-in reward \(did you mean 'accuracy'\?\); as a reward"):
        RewardRunner(["acuracy"], load_model=fails)
    with pytest.raises(UserError, match=r"^someone/acuracy can't be loaded\.$"):
        RewardRunner(["someone/acuracy"], load_model=fails)
    with pytest.raises(UserError, match="not built in: it runs programs on Piston"):
        RewardRunner(["cf_code"], load_model=fails)
