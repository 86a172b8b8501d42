from __future__ import annotations

import json
import sys
import threading

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards import binary_code_reward, code_reward, extract_code, sandbox
from lowvram_grpo.rewards import code as code_module

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's")


def fenced(source):
    return [{"role": "assistant", "content": f"<think>\nhm\n</think>\n```python\n{source}\n```"}]


def info(*cases, **more):
    return {"language": "python", "test_cases": list(cases), **more}


def printed(given, output):
    return {"input": given, "output": output, "type": "stdin_stdout", "fn_name": None}


def returned(name, given, output):
    return {"input": given, "output": output, "type": "function_call", "fn_name": name}


DOUBLES = [printed("1\n", "2\n"), printed("2\n", "4"), printed("5\n", "10\n"), printed("-1\n", "-2\n")]


def test_the_share_of_tests_passed():
    programs = [
        "print(2 * int(input()))",
        "print(abs(2 * int(input())))",
        "n = int(input())\nprint(2 if n == 1 else n)",
        "1 / 0",
        "print(2 * int(input())",
    ]
    replies = [fenced(program) for program in programs]
    assert code_reward(replies, [info(*DOUBLES)] * 5) == [1.0, 0.75, 0.25, 0.0, 0.0]
    assert binary_code_reward(replies, [info(*DOUBLES)] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_program_that_fails_after_its_output_has_failed():
    assert code_reward([fenced("print(2); raise SystemExit(1)")], [info(DOUBLES[0])]) == [0.0]


@pytest.mark.parametrize(
    ("output", "reward"),
    [("1\n2\n", 1.0), ("1 \n 2", 1.0), ("1\n2\n\n", 1.0), ("1", 0.0), ("1\n2\n3", 0.0), ("1 2", 0.0), ("", 0.0)],
)
def test_every_line_counts_white_space_at_its_ends_does_not(output, reward):
    assert code_reward([fenced(f"import sys; sys.stdout.write({output!r})")], [info(printed("", "1\n2\n"))]) == [reward]


@pytest.mark.parametrize(
    ("source", "case", "reward"),
    [
        ("def f(a, b): return a + b", returned("f", [1, 2], 3), 1.0),
        ("def f(a, b): return a + b", returned("f", "[1, 2]", "3"), 1.0),
        ("def f(a, b): return a + b", returned("f", "1\n2", "[3]"), 1.0),
        ("def f(a, b): return str(a + b)", returned("f", [1, 2], 3), 0.0),
        ("class Solution:\n    def f(self, a): return a[::-1]", returned("f", [[1, 2]], [[2, 1]]), 1.0),
        ("def f(): return (1, (2.0000000001, None))", returned("f", [], [1, [2.0, None]]), 1.0),
        ("def f(): return True", returned("f", [], 1), 0.0),
        ("def f(): return {1: {2, 3}}", returned("f", [], {"1": [2, 3]}), 1.0),
        ("print('noise')\ndef f(): return 3\nprint('more')", returned("f", [], 3), 1.0),
        ("def g(): return 3", returned("f", [], 3), 0.0),
        ("def f(): raise ValueError", returned("f", [], 3), 0.0),
        ("print('\\x1e@returned 3')\nraise SystemExit", returned("f", [], 4), 0.0),
        ("print(input())", {"input": "x", "output": "x"}, 1.0),
    ],
)
def test_functions_return_what_is_expected(source, case, reward):
    assert code_reward([fenced(source)], [info(case)]) == [reward]


def test_a_program_whose_function_is_called_is_no_script():
    source = "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(2 * int(input()))"
    cases = [info(returned("add", [1, 2], 3)), info(printed("2\n", "4\n"))]
    assert code_reward([fenced(source)] * 2, cases) == [1.0, 1.0]


def test_data_as_they_come():
    good = fenced("print(2 * int(input()))")
    said = [json.dumps(info(*DOUBLES)), {"test_cases": json.dumps(DOUBLES)}, info(), None, info(printed(["3"], ["6"]))]
    assert code_reward([good] * 5, said) == [1.0, 1.0, None, None, 1.0]
    assert binary_code_reward([good] * 2, [info(), None]) == [None, None]
    assert code_reward(["no code", "```\nprint(2)\n```"], [info(printed("", ""))] * 2) == [0.0, 0.0]
    calls = [{"role": "assistant", "content": "```python\nprint(1)\n```"}, {"role": "tool", "content": "1"}, *good]
    assert code_reward([calls], [info(*DOUBLES)]) == [1.0], "the last message is the reply"


def test_the_last_block_is_the_program():
    assert extract_code("```python\na\n```\n```python\nb\n```\n```cpp\nc\n```") == "b\n"
    assert extract_code("```cpp\nc\n```", "cpp") == "c\n" and extract_code("none") == ""


def test_one_that_hangs_leaves_the_others_alone_and_has_an_end(monkeypatch):
    monkeypatch.setattr(sandbox, "_START_SECONDS", 0.7)
    monkeypatch.setattr(code_module, "TOTAL_SECONDS", 0.5)
    runs = []
    ran = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda source, *a: runs.append(source) or ran(source, *a))
    reward = code_module.CodeReward(num_parallel=2, limits=sandbox.Limits(seconds=0.3))
    replies = [fenced("while True: pass"), fenced("print(2 * int(input()))")]
    assert reward(replies, [info(*DOUBLES), info(DOUBLES[0])]) == [0.0, 1.0]
    assert len(runs) == 2, "no time is left for the other tests of the one that hangs"


def test_no_more_at_a_time_than_asked(monkeypatch):
    now, most, lock = [0], [0], threading.Lock()
    ran = sandbox.run

    def counted(*arguments):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            return ran(*arguments)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(sandbox, "run", counted)
    assert code_reward([fenced("print(2)")] * 6, [info(DOUBLES[0])] * 6, num_parallel=3) == [1.0] * 6
    assert most[0] == 3


def test_the_expected_output_never_reaches_the_program(monkeypatch):
    given = []
    monkeypatch.setattr(sandbox, "run", lambda *a: given.append(a) or sandbox.Outcome("done", 0, "nothing"))
    code_reward([fenced("x"), fenced("x")], [info(printed("1", "SECRET")), info(returned("f", [1], "SECRET"))])
    assert len(given) == 2 and "SECRET" not in repr(given)


@pytest.mark.parametrize(
    ("more", "data", "error", "said"),
    [
        ({"provider_type": "e2b"}, info(), UserError, "code_provider e2b sends programs to the service of E2B"),
        ({"provider_type": "locl"}, info(), UserError, r"'locl' \(did you mean 'local'\?\); it must be local"),
        ({}, info(language="cpp"), UserError, "row 0 of verification_info wants a program in 'cpp'"),
        ({}, "no json", UserError, "row 0 of verification_info is str without a list `test_cases`"),
        ({}, info({"input": "1"}), UserError, "each needs `input` and `output`"),
    ],
)
def test_what_can_not_be_run_is_named(more, data, error, said):
    with pytest.raises(error, match=said):
        code_reward([fenced("print(1)")], [data], **more)


def test_several_languages_can_be_forbidden():
    with pytest.raises(ValueError, match="must have the same language; found cpp, python"):
        code_reward(["a", "b"], [info(), info(language="cpp")], enforce_same_language=True)


def test_without_a_sandbox_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "programs can't be confined here.")
    with pytest.raises(UserError, match=r"^programs can't be confined here"):
        code_reward([], [])


@pytest.mark.parametrize(
    "body",
    ["return 10**400", "return [10**400]", "import sys; sys.stdout.write('\\x1e@returned ' + '[' * 10**6); sys.exit()"],
    ids=["beyond floats", "in a list", "too deep"],
)
def test_no_answer_stops_the_judge(body):
    case = returned("f", [1], [1.5])
    assert code_reward([fenced(f"def f(x):\n    {body}")], [info(case)]) == [0.0]
