from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards import symbolic
from lowvram_grpo.rewards.maths import accuracy

ENDLESS = "(x+1)^{9999}"  # simplify() does not come back, and no pattern foresees it


@pytest.fixture
def worker(monkeypatch):
    """A helper process of the test's own, with less patience."""
    worker = symbolic._Worker()
    monkeypatch.setattr(symbolic, "_worker", worker)
    monkeypatch.setattr(symbolic, "SECONDS", 0.4)
    symbolic.equal("0", "1")
    yield worker
    worker.stop()


@pytest.mark.parametrize(
    ("gold", "reply", "verdict"),
    [
        (r"\frac{1}{2^{99}}", r"\frac{2}{2^{100}}", True),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False),
        (r"x\cdot 10^{-19}", r"2x\cdot 10^{-19}", False),
        (r"\{10^{-9},2\}", r"\{10^{-8},2\}", False),
        (r"e^{-20}", r"e^{-21}", False),
        (r"\sqrt{2}", "1.414214", True),
        (r"\sqrt{2}", "1.4142", False),
        (r"\begin{pmatrix}1\\0\end{pmatrix}", r"\begin{pmatrix}1\\10^{-8}\end{pmatrix}", False),
        (r"4\foo 3", "4", None),
    ],
)
def test_formulas_are_compared_as_a_whole_and_to_their_last_digit(gold, reply, verdict):
    assert symbolic.equal(gold, reply) is verdict


@pytest.mark.parametrize("off_the_main_thread", [False, True])
def test_a_comparison_that_does_not_end_is_wrong_after_its_seconds(worker, off_the_main_thread):
    rewards = []

    def score():
        rewards.extend(accuracy([f"<answer>{ENDLESS}</answer>", "<answer>2x+x</answer>"], answer=["x^{9999}", "3x"]))

    start = time.monotonic()
    if off_the_main_thread:
        thread = threading.Thread(target=score)
        thread.start()
        thread.join()
    else:
        score()
    assert rewards == [0.0, 1.0]
    assert 0.3 < time.monotonic() - start < 15


def test_a_reference_that_ran_out_of_time_gets_less_of_it(worker):
    for exponent in (9999, 9998, 9997):
        assert symbolic.equal(ENDLESS, f"x^{{{exponent}}}") is False
    start = time.monotonic()
    assert symbolic.equal(ENDLESS, "x^{9996}") is False
    assert time.monotonic() - start < 0.35


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="a process can't be held from outside here")
def test_a_helper_that_no_signal_interrupts_is_replaced(worker):
    held = worker._process
    os.kill(held.pid, signal.SIGSTOP)
    assert symbolic.equal("2x", "x+x") is False  # no verdict in time
    assert held.poll() is not None and symbolic.equal("3x", "x+2x") is True


def test_a_helper_that_died_is_replaced(worker):
    worker._process.kill()
    worker._process.wait()
    assert symbolic.equal("2y", "y+y") is True


def test_a_helper_that_cannot_start_is_named(monkeypatch):
    monkeypatch.setattr(symbolic, "_worker", symbolic._Worker())
    monkeypatch.setattr(symbolic.sys, "executable", os.path.join(os.sep, "no", "python"))
    with pytest.raises(UserError, match="'accuracy' could not start its helper process"):
        symbolic.equal("x", "y")


def test_numbers_and_words_need_no_helper(tmp_path):
    code = (
        "import sys; from lowvram_grpo.rewards.maths import accuracy; from lowvram_grpo.rewards import symbolic\n"
        "assert accuracy(['18 km', '**1,234**', 'B', 'no'], answer=['18', '1234', 'B', 'No']) == [1.0] * 4\n"
        "assert symbolic._worker._process is None and 'sympy' not in sys.modules\n"
        # The working folder may hold another version of this package.
        "assert symbolic.equal('2x', 'x+x') is True and 'sympy' not in sys.modules"
    )
    (tmp_path / "lowvram_grpo").mkdir()
    (tmp_path / "lowvram_grpo" / "__init__.py").touch()
    root = os.path.dirname(os.path.dirname(os.path.dirname(symbolic.__file__)))
    code = f"import sys; sys.path[0] = {root!r}\n" + code
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
