r"""Reward for a right answer to a question of mathematics, compared as mathematics: `0.5` equals `\frac{1}{2}`.

Parsing and comparing are Hugging Face's math-verify (https://github.com/huggingface/Math-Verify, on sympy). What stands
here decides which part of a reply is its answer, and keeps sympy away from what it can't finish.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Sequence
from typing import Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.tags import answer_text, completion_text

_SECONDS = 3
_NOT_COLUMNS = {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"}
_TAGS = re.compile(r"</?(?:think|answer)>")
_NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[-−]?\$?(\d[\d,]*(?:\.\d+)?)")
_NOTATION = re.compile(r"[A-Za-z\\^_(\[{]")
_WORD = re.compile(r"(?<!\\)(?<![A-Za-z])[A-Za-z]{2,}")
# sympy evaluates these for hours or until memory is gone, inside C code that no alarm interrupts in time.
_EXPLOSIVE = re.compile(
    r"(?:\^|\*\*)[\s{(]*\d+[\s})]*(?:\^|\*\*)"  # 9^9^9
    r"|(?:\^|\*\*)[\s{(]*-?\d{4,}"  # 2^99999
    r"|\d{4,}[\s})]*!"  # 99999!
    r"|\\(?:sum|prod|int|lim|d?binom)\b"
)


def accuracy(
    completions: Sequence,
    answer: Sequence | None = None,
    solution: Sequence | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1 where the reply's answer equals the reference in column `answer` (or else `solution`), 0 where not.

    The reply's answer is the text of its last `<answer></answer>` pair, else its last `\boxed{}`, else what
    math-verify finds in the text (an announced result, or the last expression), else the last number. Of a
    GSM8K reference only what follows `####` counts. None where the reference is nothing that can be compared.

    Raises:
        UserError: the data has neither column.
    """
    golds = answer if answer is not None else solution
    if golds is None:
        found = ", ".join(sorted(columns.keys() - _NOT_COLUMNS)) or "none"
        raise UserError(
            f"the reward 'accuracy' needs a column `answer` or `solution` to compare with; columns found: {found} "
            "(name the column of the references with --answer-column)."
        )
    return [_score(completion_text(c), gold) for c, gold in zip(completions, golds)]


def _score(reply: str, reference: Any) -> float | None:
    gold = None if reference is None else _parse_answer(str(reference).rsplit("####", 1)[-1].strip())
    if not gold:
        return None
    return float(_equal(gold, _parse_reply(reply)))


def _parse_reply(reply: str) -> list:
    final = answer_text(reply)
    text = reply if final is None else final
    if (boxed := _last_boxed(text)) is not None:
        return _parse_answer(boxed)
    if final is not None:
        return _parse_answer(final)
    text = _TAGS.sub(" ", text)
    return (not _EXPLOSIVE.search(text) and _parse(text)) or _last_number(text)


def _parse_answer(text: str) -> list:
    """Expressions in a text that is an answer and nothing else; empty if it is no mathematics."""
    if not text or _EXPLOSIVE.search(text):
        return []
    # Without its dollar signs LaTeX is not recognised, and `3x+1` would be read as the number 3.
    bare_notation = "$" not in text and _NOTATION.search(text) and not _WORD.search(text)
    if bare_notation and (found := _parse(text if r"\(" in text or r"\boxed" in text else f"${text}$")):
        return found
    return _parse(text) or _last_number(text)


def _last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, None without a closed one."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return None


def _last_number(text: str) -> list:
    """The last number where math-verify sees none, as in `答案是18。` or `(18)`."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return []
    sign = "-" if numbers[-1].group().startswith(("-", "−")) else ""
    return _parse(sign + numbers[-1].group(1).replace(",", ""))


def _seconds() -> int | None:
    """math-verify's time limit: an alarm signal, which exists only in POSIX main threads.

    Elsewhere it would raise, or on Windows start a process that can't be pickled and swallow that: all rewards None.
    """
    alarm_works = os.name == "posix" and threading.current_thread() is threading.main_thread()
    return _SECONDS if alarm_works else None


def _parse(text: str) -> list:
    _quiet()
    from math_verify import parse

    return parse(text, parsing_timeout=_seconds())


def _equal(gold: list, found: list) -> bool:
    from math_verify import verify

    return bool(found) and verify(gold, found, timeout_seconds=_seconds())


def _quiet() -> None:
    # It warns that the time limit is off and logs a traceback per unparsable reply; both are expected here.
    for name in ("parser", "grader", "utils"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.CRITICAL)
