"""The child process of symbolic.py: a line of JSON `[kind, gold, reply, seconds]` comes in, one goes out.

Of "formulas" `true` or `false`, `null` where the reference can't be read; of "texts" a list of that, the reference and
the reply as they were read. `"out of time"` where the seconds did not suffice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

_MEMORY_BYTES = 4 << 30
# Beyond, a number counts as 0.
_MAX_DIGITS = 1200


class _OutOfTime(BaseException):
    """No Exception: sympy and math-verify catch those."""


def serve() -> None:
    """Answer requests until standard input ends, which it does with the parent."""
    # Ctrl-C is the parent's to handle; it reaches every process of the terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    _limit_memory()
    try:
        _parse("1")
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        kind, gold, reply, seconds = json.loads(line)
        try:
            with _time_limit(seconds):
                verdict = compare(gold, reply) if kind == "formulas" else compare_texts(gold, reply)
        except _OutOfTime:
            verdict = "out of time"
        except (MemoryError, RecursionError):
            verdict = "out of time"
        print(json.dumps(verdict), flush=True)


def compare(gold: str, reply: str) -> bool | None:
    """Whether two formulas are equal by math-verify; None where it can't read `gold`."""
    from math_verify import verify

    wanted = _parse(gold)
    if wanted is None:
        return None
    found = _parse(reply)
    if found is None:
        return False
    settings = {"allow_set_relation_comp": True, "timeout_seconds": None}
    if not verify(wanted, found, **settings):
        return False
    # Its six decimals and fifteen digits make all small numbers equal: as many more as the smallest one has zeros.
    zeros = max(_zeros(wanted), _zeros(found))
    return zeros == 0 or bool(verify(wanted, found, float_rounding=6 + zeros, numeric_precision=15 + zeros, **settings))


def compare_texts(gold: str, reply: str) -> tuple[bool | None, str, str]:
    """Whether what math-verify finds in two texts is equal, and what it finds, as TRL's accuracy_reward asks it: of the
    reference anything, of the reply LaTeX behind an anchor, `\\boxed{}` first."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    wanted = _parse_gold(gold)
    if not wanted:
        return None, "[unparseable]", "[skipped]"
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    found = parse(reply, extraction_config=[config], extraction_mode="first_match", parsing_timeout=None)
    equal = bool(verify(wanted, found, timeout_seconds=None))
    return equal, str(wanted), str(found) if found else "[unparseable]"


@lru_cache(maxsize=1024)
def _parse_gold(text: str) -> list:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


@lru_cache(maxsize=1024)
def _parse(formula: str) -> Any:
    """The whole formula as a sympy object, None where math-verify can't read all of it."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units and the like were taken off before; what math-verify drops silently would be no part of the comparison.
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    found = parse(
        f"${formula}$",
        extraction_config=[LatexExtractionConfig(normalization_config=config, boxed_match_priority=-1)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _zeros(expression: Any) -> int:
    """How many decimals more than six an expression's smallest number needs to be told apart from its neighbours."""
    from sympy import Basic, MatrixBase, preorder_traversal

    smallest = 0
    parts = expression.flat() if isinstance(expression, MatrixBase) else [expression]
    for part in parts:
        for node in preorder_traversal(part) if isinstance(part, Basic) else ():
            if getattr(node, "is_number", False) and (size := _magnitude(node)) is not None:
                smallest = min(smallest, size)
    # 0.01 keeps five digits of the six decimals, enough for a rounded number.
    return min(max(0, -smallest - 2), _MAX_DIGITS)


def _magnitude(number: Any) -> int | None:
    """The exponent of ten of a real number other than 0."""
    try:
        value = abs(number.evalf(5))
        if not value.is_Float or value == 0:
            return None
        mantissa, exponent = value._mpf_[1], value._mpf_[2]
        return math.floor((mantissa.bit_length() + exponent) * math.log10(2))
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return None


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Where there is an alarm signal the parent need not end this process, and pay for another one."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _MEMORY_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, hard))
