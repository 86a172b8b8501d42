"""Reward functions that do what they must not: the run goes on, or ends with a sentence, and never notices the rest."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from transformers import TrainerState

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.runner import RewardRunner
from lowvram_grpo.run.capture import KEPT_BYTES, Capture

COMPLETIONS = ["a", "bb", "ccc"]
posix = pytest.mark.skipif(os.name != "posix", reason="forks")


def length(completions, **kwargs):
    return [len(c) for c in completions]


def score(*funcs, columns=None, state=None, completions=COMPLETIONS, seed=None, runner=None, **settings):
    runner = runner or RewardRunner(list(funcs), **settings)
    n = len(completions)
    return runner(["p"] * n, completions, [[1, 2]] * n, columns or {}, state, seed=seed)


# What it returns


def forever(completions, **kwargs):
    return itertools.repeat(1.0)


class Odd:
    def __init__(self, value):
        self.value = value

    def __float__(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def __repr__(self):
        return "x" * 10_000_000


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda: itertools.repeat(1.0), "returned more than 3 rewards for 3 completions"),
        (lambda: (1 / 0 for _ in range(3)), "raised ZeroDivisionError: division by zero"),
        (lambda: {1.0, 2.0, 3.0}, "returned set, not a list of 3 rewards"),
        (lambda: [1.0, Odd(RuntimeError("no")), 2.0], "gave xxx+ ... xxx+ for row 1"),
        (lambda: [1.0, 1j, 2.0], "gave 1j for row 1"),
        (lambda: np.ones((3, 1)), r"gave \[1.0\] for row 0"),
    ],
)
@pytest.mark.parametrize("timeout", [None, 10])
def test_odd_outputs_are_named_in_a_short_sentence(output, message, timeout):
    def func(completions, **kwargs):
        return output()

    with pytest.raises(UserError, match=message) as caught:
        score(func, timeout=timeout)
    assert len(str(caught.value)) < 1000


def test_arrays_tensors_and_generators_are_lists_of_numbers():
    def generates(completions, **kwargs):
        for c in completions:
            yield Odd(float(len(c)))

    def array(completions, **kwargs):
        return np.array([1.0, None, 3.0], dtype=object)

    async def awaited(completions):
        return [1, 1, 1]

    def hands_on(completions, **kwargs):
        return awaited(completions)

    assert score(generates, lambda **k: torch.ones(3, requires_grad=True), hands_on).total.tolist() == [3, 4, 5]
    assert score(array).per_func[:, 0].isnan().tolist() == [False, True, False]


def test_an_endless_message_is_cut_and_an_unreadable_one_named():
    class Unreadable(Exception):
        def __str__(self):
            raise ValueError

    def loud(completions, **kwargs):
        raise ValueError("x" * 10_000_000)

    def silent(completions, **kwargs):
        raise Unreadable

    with pytest.raises(UserError, match="raised ValueError: xxx") as caught:
        score(loud)
    assert len(str(caught.value)) < 1000
    with pytest.raises(UserError, match="raised Unreadable: an error whose message can't be read"):
        score(silent)


# What it does to what it is given


def test_nothing_that_a_function_changes_is_seen_by_the_next_or_the_run():
    def rude(prompts, completions, completion_ids, meta, numbers, tensor, trainer_state, **kwargs):
        prompts.clear()
        completions[0][0]["content"] = "changed"
        completion_ids[1].append(7)
        meta[0]["tags"].append("changed")
        numbers[2][0] = 99
        tensor[0].zero_()
        trainer_state.global_step = 1000
        trainer_state.log_history.clear()
        return [0, 0, 0]

    seen = {}

    def looks(**kwargs):
        seen.update(kwargs)
        return [1, 1, 1]

    completions = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    columns = {
        "meta": [{"tags": ["a"]}] * 3, "numbers": [np.ones(2)] * 3, "tensor": [torch.ones(2)] * 3,
    }  # fmt: skip
    state = TrainerState(global_step=3, log_history=[{"loss": 1.0}])
    ids = [[1], [2], [3]]
    RewardRunner([rude, looks])(["p"] * 3, completions, ids, columns, state)
    for where in (seen, {**columns, "completions": completions, "completion_ids": ids, "trainer_state": state}):
        assert [c[0]["content"] for c in where["completions"]] == COMPLETIONS
        assert where["completion_ids"] == [[1], [2], [3]]
        assert where["meta"][0] == {"tags": ["a"]}
        assert where["numbers"][2][0] == 1 and where["tensor"][0].tolist() == [1, 1]
        assert where["trainer_state"].global_step == 3 and where["trainer_state"].log_history == [{"loss": 1.0}]


# What it does to the process


def test_the_process_is_the_runs_again_and_the_functions_own_at_its_next_call(tmp_path):
    found = []

    def moves(completions, **kwargs):
        found.append((os.getcwd(), torch.get_default_dtype(), os.environ.get("LOWVRAM_TEST"), "HOME" in os.environ))
        os.chdir(tmp_path)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        os.environ["LOWVRAM_TEST"] = "1"
        os.environ.pop("HOME", None)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return [0, 0, 0]

    before = os.getcwd(), os.environ.get("HOME"), signal.getsignal(signal.SIGINT)
    runner = RewardRunner([moves])
    for _ in range(2):
        score(runner=runner)
        assert (os.getcwd(), os.environ.get("HOME"), signal.getsignal(signal.SIGINT)) == before
        assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
        assert "LOWVRAM_TEST" not in os.environ
    assert not hasattr(signal, "getitimer") or signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert found == [(before[0], torch.float32, None, "HOME" in os.environ), (str(tmp_path), torch.float64, "1", False)]


def test_random_numbers_are_a_function_of_the_seed_and_the_runs_are_left_alone():
    def draws(completions, **kwargs):
        return [random.random() + float(np.random.rand()) + float(torch.rand(())) for _ in completions]

    def reseeds(completions, **kwargs):
        random.seed(0)
        torch.manual_seed(0)
        np.random.seed(0)
        return [0, 0, 0]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = score(draws, seed=3).total
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(score(draws, seed=3).total, first)
    assert not torch.equal(score(draws, seed=4).total, first)
    # Nor do they depend on what another function has drawn.
    alone, beside = score(length, draws, seed=3).per_func[:, 1], score(reseeds, draws, seed=3).per_func[:, 1]
    assert torch.equal(alone, beside)


@posix
@pytest.mark.parametrize("timeout", [None, 10])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_forked_process_ends_and_only_one_goes_on(tmp_path, timeout, kind):
    def forks(completions, **kwargs):
        if os.fork() == 0:
            raise RuntimeError("in the child")
        return length(completions)

    async def forks_async(completions, **kwargs):
        return forks(completions)

    runner = RewardRunner([forks if kind == "sync" else forks_async], timeout=timeout)
    total = score(runner=runner).total.tolist()
    (tmp_path / str(os.getpid())).touch()  # a child that went on would leave its own
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    assert total == [1, 2, 3] and [p.name for p in tmp_path.iterdir()] == [str(os.getpid())]


@pytest.mark.parametrize("end", ["os._exit(3)", "sys.exit(3)", "os.abort()", "os.execv('/bin/true', ['true'])"])
@pytest.mark.parametrize("timeout", [None, 10])
def test_what_would_end_the_process_is_an_error(end, timeout):
    def ends(completions, **kwargs):
        exec(end)

    with pytest.raises(UserError, match=r"'ends' raised (RuntimeError: os.* would end the training|SystemExit: 3)"):
        score(ends, timeout=timeout)
    assert os._exit.__name__ == "_exit"


@posix
def test_child_processes_may_end_as_they_do():
    import multiprocessing

    def asks(completions, **kwargs):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.map(len, completions)

    assert score(asks).total.tolist() == [1, 2, 3]


@posix
def test_closed_output_is_opened_again(capfd):
    def closes(completions, **kwargs):
        os.close(1)
        sys.stderr = None
        return [0, 0, 0]

    error = sys.stderr
    score(closes)
    os.write(1, b"still here\n")
    assert sys.stderr is error and "still here" in capfd.readouterr().out


def test_threads_that_it_leaves_behind_are_known():
    free = threading.Event()

    def leaves(completions, **kwargs):
        threading.Thread(target=free.wait, name="forgotten").start()
        return [0, 0, 0]

    score(leaves)
    left = [t for t in threading.enumerate() if getattr(t, "left_by_reward", False) and t.is_alive()]
    free.set()
    assert "forgotten" in [t.name for t in left]


# What it prints


@posix
def test_output_of_all_kinds_goes_into_the_log_and_its_last_line_is_said_once(tmp_path, capfd):
    def prints(completions, **kwargs):
        print("printed")
        print("an error", file=sys.stderr)
        os.system("echo from a child")
        os.write(1, b"from C\n")
        return [0, 0, 0]

    async def also(completions, **kwargs):
        print("async")
        return [0, 0, 0]

    said = []
    runner = RewardRunner([prints, also])
    runner.capture = Capture(tmp_path / "rewards.log", said.append)
    for _ in range(2):
        score(runner=runner)
    print("mine")
    assert capfd.readouterr() == ("mine\n", "")
    log = (tmp_path / "rewards.log").read_text()
    assert all(log.count(line) == 2 for line in ("printed", "an error", "from a child", "from C", "async"))
    assert "--- prints" in log
    assert any("'prints' writes to the screen: kept in" in sentence for sentence in said) and len(said) <= 2


@posix
def test_ten_megabytes_are_cut(tmp_path, capfd):
    def floods(completions, **kwargs):
        print("first")
        for _ in range(100):
            print("x" * 99_999)
        print("last")
        sys.stdout.close()
        return [0, 0, 0]

    runner = RewardRunner([floods])
    runner.capture = Capture(tmp_path / "rewards.log", lambda sentence: None)
    for _ in range(2):
        score(runner=runner)
    log = (tmp_path / "rewards.log").read_text()
    assert log.count("first") == log.count("last") == 2 and "bytes left out" in log
    assert len(log) < 5 * KEPT_BYTES and capfd.readouterr().out == ""
