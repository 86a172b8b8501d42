"""Rewards for programs that pass tests: `code_reward` is the share of tests passed, `binary_code_reward` all or none.

The data are Open R1's (huggingface.co/datasets/open-r1/verifiable-coding-problems-python): a column `verification_info`
with `language` and `test_cases`, each with `type`, `input`, `output` and `fn_name`. Programs run in sandbox.py, which
never sees an expected output.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.rewards import sandbox
from lowvram_grpo.rewards.sandbox_protocol import RESULT
from lowvram_grpo.rewards.tags import completion_text

# Of all tests of one program together; those that it leaves no time for have failed.
TOTAL_SECONDS = 30.0
_MOST_PARALLEL = 8
_BINARY_THRESHOLD = 0.99
_SAME_DIGITS = 1e-9
_ELSEWHERE = {
    "e2b": "sends programs to the service of E2B, which takes an account and a network",
    "morph": "sends programs to the service of Morph Cloud, which takes an account and a network",
    "piston": "sends programs to a cluster of Piston servers",
}


class _Case(NamedTuple):
    """One test. `function` is None where the program reads `given` and prints; else it is called with the arguments in
    `given`, a list as JSON, and returns `expected`."""

    function: str | None
    given: str
    expected: Any


@dataclass(frozen=True)
class CodeReward:
    """The share of tests that the last block of Python in each completion passes; None without tests.

    Attributes:
        num_parallel: programs that run at a time; None: one a core, at most 8.
        provider_type: "local"; another one is refused by name.
        enforce_same_language: stop where the rows are in several languages.
        limits: of a program on one test.
        binary: 1 where all are passed, else 0.
    """

    num_parallel: int | None = None
    provider_type: str = "local"
    enforce_same_language: bool = False
    limits: sandbox.Limits = sandbox.Limits()
    binary: ClassVar[bool] = False
    __name__: ClassVar[str] = "code_reward"

    def __call__(self, completions: Sequence, verification_info: Sequence, **columns: Any) -> list[float | None]:
        check_provider(self.provider_type)
        if reason := sandbox.why_not():
            raise UserError(reason)
        tests = [_tests(info, row) for row, info in enumerate(verification_info)]
        languages = {language for language, _ in tests}
        if self.enforce_same_language and len(languages) > 1:
            raise ValueError(f"All verification_info must have the same language; found {', '.join(sorted(languages))}")
        for row, (language, _) in enumerate(tests):
            if language != "python":
                raise UserError(
                    f"row {row} of verification_info wants a program in {language!r}; rewards run Python programs only."
                )
        # A chat's last message is the reply; those before it are tools' and earlier turns.
        texts = [completion_text(c if isinstance(c, str) else c[-1:]) for c in completions]
        with ThreadPoolExecutor(self.num_parallel or min(_cores(), _MOST_PARALLEL)) as pool:
            return list(pool.map(self._score, map(extract_code, texts), [cases for _, cases in tests]))

    def _score(self, program: str, cases: list[_Case]) -> float | None:
        if not cases:
            return None
        if not program.strip():
            return 0.0
        end = time.monotonic() + TOTAL_SECONDS
        passed = 0
        for case in cases:
            if time.monotonic() > end or not _passes(program, case, self.limits):
                if self.binary:
                    return 0.0
                continue
            passed += 1
        share = passed / len(cases)
        return float(share > _BINARY_THRESHOLD) if self.binary else share


@dataclass(frozen=True)
class BinaryCodeReward(CodeReward):
    binary: ClassVar[bool] = True
    __name__: ClassVar[str] = "binary_code_reward"


def code_reward(
    completions: Sequence,
    verification_info: Sequence,
    num_parallel: int | None = None,
    provider_type: str = "local",
    enforce_same_language: bool = False,
    **columns: Any,
) -> list[float | None]:
    """The share of tests in `verification_info` that the last ```python block of each completion passes. A test is
    passed where the program ends well and prints the expected lines, white space at their ends aside; or where its
    function returns what is expected. None where a row has no tests.

    Args:
        verification_info: a mapping, or one as JSON, for each completion: `{"language": "python", "test_cases":
            [{"type": "stdin_stdout", "input": str, "output": str}, {"type": "function_call", "fn_name": str,
            "input": list | JSON, "output": value | JSON}]}`.
        num_parallel, provider_type, enforce_same_language: see `CodeReward`.

    Raises:
        UserError: no sandbox on this machine, an unknown provider, another language, or a test of another form.
        ValueError: several languages, where that is forbidden.
    """
    return CodeReward(num_parallel, provider_type, enforce_same_language)(completions, verification_info)


def binary_code_reward(
    completions: Sequence,
    verification_info: Sequence,
    num_parallel: int | None = None,
    provider_type: str = "local",
    enforce_same_language: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where `code_reward` is above 0.99, else 0; None where a row has no tests."""
    return BinaryCodeReward(num_parallel, provider_type, enforce_same_language)(completions, verification_info)


def check_provider(name: str) -> None:
    """Raises:
    UserError: programs can't run there.
    """
    if name in _ELSEWHERE:
        raise UserError(
            f"code_provider {name} {_ELSEWHERE[name]}; here they run in a sandbox: write local, or drop it."
        )
    if name != "local":
        raise UserError(f"code_provider is {name!r}{did_you_mean(name, ['local', *_ELSEWHERE])}; it must be local.")


def runs_programs(reward: Any) -> bool:
    """Whether a reward function is one of these."""
    return isinstance(reward, CodeReward) or reward in (code_reward, binary_code_reward)


def extract_code(completion: str, language: str = "python") -> str:
    """The last fenced block in `language`, empty without one."""
    blocks = re.findall(rf"```{re.escape(language)}\n(.*?)```", completion, re.DOTALL)
    return blocks[-1] if blocks else ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tests(info: Any, row: int) -> tuple[str, list[_Case]]:
    """Language and tests of a row's `verification_info`."""
    info = _parsed(info)
    if info is None:
        return "python", []
    cases = _parsed(info.get("test_cases")) if isinstance(info, Mapping) else None
    if not isinstance(info, Mapping) or not isinstance(cases, (list, type(None))):
        raise UserError(
            f"row {row} of verification_info is {type(info).__name__} without a list `test_cases`; it must be "
            '{"language": "python", "test_cases": [{"input": ..., "output": ...}, ...]}.'
        )
    return info.get("language") or "python", [_case(case, row) for case in cases or []]


def _case(case: Any, row: int) -> _Case:
    if not isinstance(case, Mapping) or not {"input", "output"} <= case.keys():
        raise UserError(f"a test in row {row} of verification_info is {case!r}; each needs `input` and `output`.")
    if case.get("type") in (None, "stdin_stdout") or not case.get("fn_name"):
        return _Case(None, _lines(case["input"]), _lines(case["output"]))
    return _Case(case["fn_name"], json.dumps(_arguments(case["input"])), _parsed(case["output"]))


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(given: Any) -> list:
    """A list of arguments; text holds one as JSON, or an argument a line."""
    if isinstance(given, str):
        whole = _parsed(given)
        given = whole if isinstance(whole, list) else [_parsed(line) for line in given.strip().split("\n")]
    return given if isinstance(given, list) else [given]


def _parsed(value: Any) -> Any:
    """JSON as what it says; other text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _passes(program: str, case: _Case, limits: sandbox.Limits) -> bool:
    outcome = sandbox.run(program, case.given, limits, case.function)
    if not outcome.fine:
        return False
    if case.function is None:
        return _stripped(outcome.output) == _stripped(case.expected)
    try:
        returned = json.loads(outcome.output.rpartition(RESULT)[2])
    except (ValueError, RecursionError):  # the program has printed what only its caller should
        return False
    # Call-based tests of APPS and TACO put the value into a list of its own.
    alone = isinstance(case.expected, list) and len(case.expected) == 1
    return _same(returned, case.expected) or (alone and _same(returned, case.expected[0]))


def _stripped(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in value)
    if isinstance(value, float) or isinstance(expected, float):
        return {type(value), type(expected)} <= {int, float} and _close(value, expected)
    return type(value) is type(expected) and value == expected


def _close(value: float, expected: float) -> bool:
    try:
        return math.isclose(value, expected, rel_tol=_SAME_DIGITS, abs_tol=_SAME_DIGITS)
    except OverflowError:  # an integer beyond all floats
        return False
