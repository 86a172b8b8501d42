from __future__ import annotations

import threading
import time

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.maths import accuracy

EQUAL = [
    ("18", "18.0"),
    ("18", "$18"),
    ("18", r"\$18"),
    ("1,234", "so it is 1234."),
    ("1234", "so it is 1,234."),
    ("-5", "-$5"),
    (18, "18"),
    ("42", "17+25=42"),
    ("18", "答案是18。"),
    ("18", "*18*"),
    ("18", "<answer>18 dollars</answer> and not 5"),
    ("18", "<answer>17</answer> no: <answer>18</answer>"),
    ("18", "<answer>18"),
    ("18", r"first \boxed{17}, then \boxed{18}, out of 20"),
    (r"\frac12", r"\boxed{0.5}"),
    (r"2\sqrt{3}", r"thus \boxed{2\sqrt{3}}"),
    ("x^2", "it is $x^2$"),
    ("3x+1", "<answer>1+3x</answer>"),
    ("(1,2)", "<answer>(1, 2)</answer>"),
    ("Half of 48 is <<48/2=24>>24, and 48+24=72.\n#### 72", "#### 72"),
    ("0", "0"),
]
DIFFERENT = [
    ("18", "19"),
    ("18", "1.8"),
    ("18", "first 18, then 10"),
    ("18", "<answer>17</answer> 18"),
    ("18", "<answer></answer> 18"),
    ("18", "no idea"),
    ("18", ""),
    ("42", "17+25="),
    ("3x+1", "3"),
    ("(1,2)", "<answer>2</answer>"),
]


@pytest.mark.parametrize(("reference", "reply"), EQUAL)
def test_equal_answers(reference, reply):
    assert accuracy([reply, [{"role": "assistant", "content": reply}]], answer=[reference] * 2) == [1.0, 1.0]


@pytest.mark.parametrize(("reference", "reply"), DIFFERENT)
def test_different_answers(reference, reply):
    assert accuracy([reply], answer=[reference]) == [0.0]


def test_references_that_cannot_be_compared_do_not_apply():
    assert accuracy(["it may be so", "3", ""], answer=["it may be so", None, ""]) == [None, None, None]


def test_solution_is_the_second_choice():
    assert accuracy(["3", "3"], solution=["3", "4"]) == [1.0, 0.0]
    assert accuracy(["3"], answer=["3"], solution=["4"]) == [1.0]


def test_neither_column_names_those_found():
    with pytest.raises(UserError, match=r"`answer` or `solution`.*columns found: label, source \("):
        accuracy(["3"], prompts=["?"], completion_ids=[[1]], label=["3"], source=["x"], trainer_state=None)


@pytest.mark.parametrize(
    "bomb",
    ["9^9^9^9", "9**9**9", "2^{99999999}", "99999999!", r"\binom{99999999}{5000000}", r"\sum_{n=1}^{9999999} n^n"],
)
def test_what_sympy_cannot_finish_is_wrong_at_once(bomb):
    start = time.monotonic()
    assert accuracy([f"<answer>{bomb}</answer>", rf"\boxed{{{bomb}}}", f"it is ${bomb}$"], answer=["7"] * 3) == [
        0,
        0,
        0,
    ]
    assert time.monotonic() - start < 2


def test_works_off_the_main_thread_where_no_alarm_does():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.extend(accuracy(["18", "19"], answer=["18", "18"])))
    thread.start()
    thread.join()
    assert rewards == [1.0, 0.0]
