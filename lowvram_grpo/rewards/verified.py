r"""Rewards that leave a whole reply to math-verify, as TRL and Open R1 do.

maths.py's `accuracy` finds the answer itself and knows words, choices, units and dates; here the reply must hold LaTeX,
best in `\boxed{}`. math-verify runs in symbolic.py's process, so a time limit holds in every thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.symbolic import Verdict, verified
from lowvram_grpo.rewards.tags import completion_text

_UNFINISHED = "[incomplete reasoning]"


def accuracy_reward(
    completions: Sequence,
    solution: Sequence | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    answer: Sequence | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1 where math-verify finds the reply's LaTeX equal to the reference, 0 where not; None where it can't read the
    reference. A comparison that takes more than 3 s counts as 0.

    Args:
        solution: references, one a completion; without this column those of `answer`.
        log_extra: gets the columns solution, gold_parsed and answer_parsed.

    Raises:
        UserError: the data has neither column.
    """
    golds = references("accuracy_reward", solution, answer)
    verdicts = judge(completions, golds)
    _log(log_extra, golds, verdicts)
    return [None if v.equal is None else float(v.equal) for v in verdicts]


def reasoning_accuracy_reward(
    completions: Sequence,
    solution: Sequence | None = None,
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    answer: Sequence | None = None,
    **columns: Any,
) -> list[float | None]:
    """`accuracy_reward` of what follows the last of `reasoning_delimiters` (of the first that occurs; by default
    `</think>`); 0 where none occurs, since the reasoning never ended.

    Raises:
        UserError: the data has neither column.
    """
    golds = references("reasoning_accuracy_reward", solution, answer)
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters
    verdicts = []
    for text, gold in zip(map(completion_text, completions), golds):
        ending = next((mark for mark in delimiters if mark in text), None)
        unfinished = Verdict(False, _UNFINISHED, _UNFINISHED)
        verdicts.append(unfinished if ending is None else verified(_text(gold), text.rpartition(ending)[2]))
    _log(log_extra, golds, verdicts)
    return [None if v.equal is None else float(v.equal) for v in verdicts]


def references(name: str, solution: Sequence | None, answer: Sequence | None) -> Sequence:
    """The column that a reward compares with.

    Raises:
        UserError: there is none.
    """
    golds = solution if solution is not None else answer
    if golds is None:
        raise UserError(
            f"the reward {name!r} needs a column `solution` or `answer` to compare with; name one with --answer-column."
        )
    return golds


def judge(completions: Sequence, golds: Sequence) -> list[Verdict]:
    """What math-verify says to each reply and its reference."""
    if len(completions) != len(golds):
        raise UserError(f"{len(golds)} references for {len(completions)} completions; give one for each.")
    return [verified(_text(gold), completion_text(c)) for c, gold in zip(completions, golds)]


def _text(gold: Any) -> str:
    return "" if gold is None else str(gold)


def _log(log_extra: Callable[[str, list], None] | None, golds: Sequence, verdicts: list[Verdict]) -> None:
    if log_extra is not None:
        log_extra("solution", list(golds))
        log_extra("gold_parsed", [v.gold for v in verdicts])
        log_extra("answer_parsed", [v.reply for v in verdicts])
