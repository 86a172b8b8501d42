r"""Reward for a right answer to a question of mathematics, compared as mathematics: `0.5` equals `\frac{1}{2}`.

extraction.py finds the part of a reply that is its answer, notation.py writes it in one way, pieces.py takes it apart,
comparison.py compares all of it. Formulas are parsed and compared by Hugging Face's math-verify
(https://github.com/huggingface/Math-Verify, on sympy) behind symbolic.py; letters and words are words.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.comparison import same_moment, same_pieces
from lowvram_grpo.rewards.extraction import Answer, answer_of
from lowvram_grpo.rewards.figures import clock, date, moments, number
from lowvram_grpo.rewards.notation import normalize, same_text
from lowvram_grpo.rewards.pieces import Piece, pieces
from lowvram_grpo.rewards.results import conclusion, group_of, result_of
from lowvram_grpo.rewards.tags import completion_text
from lowvram_grpo.rewards.words import NUMBER_WORDS, chosen, letters, option, says, word

_ZERO_COMMA = re.compile(r"-?0,\d+")
_COMMA_DECIMAL = re.compile(r"-?\d+,\d+")
_TO = re.compile(r"\s+to\s+")
_PROPORTION = re.compile(r"\d+(?:\.\d+)?(?:\s+to\s+\d+(?:\.\d+)?)+")
# "10 or more" is no 10.
_BOUND = re.compile(
    r"\b(?:more|less|fewer|greater|larger|smaller) than(?= [\d¤])|\bor (?:more|less|fewer|greater)\b|以上|以下"
)
_NOT_COLUMNS = {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"}


class _Gold(NamedTuple):
    """A reference: what it can be compared as.

    Attributes:
        text: normalized.
        choice: the letters that it is or begins with.
        word: the word that it is.
        moment: whether it is a date or a time of day.
        pieces: its formulas and numbers.
    """

    text: str
    choice: frozenset[str] | None
    word: str | None
    moment: bool
    pieces: tuple[Piece, ...]


def accuracy(
    completions: Sequence,
    answer: Sequence | None = None,
    solution: Sequence | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1 where the reply's answer equals the reference in column `answer` (or else `solution`), 0 where not.

    The reply's answer is the text of its last `<answer></answer>` pair, else its last `\boxed{}`, else what it
    announces ("the answer is"), else its last number or formula; never what stands in `<think></think>`. It must equal
    the whole reference: each of its numbers, formulas and units, though a unit may be left out. A reference that is a
    letter or a word (`B`, `Yes`, `\text{no solution}`) is compared as one. Of a GSM8K reference only what follows
    `####` counts. None where the reference is neither: a sentence, or a formula that math-verify can't read.

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
    gold = None if reference is None else _read(str(reference))
    if gold is None:
        return None
    answer = answer_of(reply)
    verdict = False if answer is None else _right(gold, answer)
    return None if verdict is None else float(verdict)


@lru_cache(maxsize=2048)
def _read(reference: str) -> _Gold | None:
    """What a reference can be compared as, None if as nothing."""
    found = answer_of(reference.rsplit("####", 1)[-1].strip())
    if found is None:
        return None
    text = _digits(normalize(found.text))
    choice = letters(text)
    lettered = option(text) if choice is None else None
    if lettered:
        choice, text = frozenset(lettered[0]), lettered[1] or text
    single = word(found.text) if choice is None else None
    formulas = single is None and (choice is None or bool(lettered and lettered[1]))
    parts = group_of(pieces(text), found.kind) if formulas else ()
    day, time = date(text), clock(text)
    if not (choice or single or parts or day):
        return None
    # `2:30` may be a ratio.
    return _Gold(text, choice, single, bool(day or (time and time[1])), parts)


def _right(gold: _Gold, answer: Answer) -> bool | None:
    text = _digits(normalize(answer.text))
    if same_text(gold.text, text):
        return True
    if gold.choice:
        named = chosen(answer, len(gold.choice))
        content = option(text)
        if named is not None and not (named == gold.choice and gold.pieces and content and content[1]):
            return named == gold.choice
        if not gold.pieces:
            return False
    if gold.word:
        return says(answer, gold.word)
    if lettered := option(text):
        text = lettered[1] or text
    if gold.moment:
        for moment in (text, *reversed(moments(text))):
            rest = text.lower().replace(moment.lower(), "", 1)
            if answer.kind == "whole" and re.search(r"[\d+*/^=\\]", rest):
                continue
            if (verdict := same_moment(gold.text, moment)) is not None:
                return verdict
        return False
    if len(gold.pieces) > 1 and len(answer.boxes) > 1:
        boxed = pieces(normalize(", ".join(answer.boxes[-len(gold.pieces) :])))
        if same_pieces(gold.pieces, boxed, strict=True):
            return True
    if len(gold.pieces) == 1 and _COMMA_DECIMAL.fullmatch(text) and number(gold.pieces[0].expr):
        text = text.replace(",", ".")
    single = len(gold.pieces) == 1
    found = pieces(conclusion(text, gold.text) if single else text)
    if not found:
        # Only to learn whether the reference can be read; a reply without mathematics is wrong then.
        return False
    if answer.kind == "whole" and set(_BOUND.findall(text)) - set(_BOUND.findall(gold.text)):
        return False
    if single:
        group = result_of(found, answer.kind)
    else:
        group = found[-len(gold.pieces) :] if answer.kind == "prose" else group_of(found, answer.kind)
    return same_pieces(gold.pieces, group, strict=answer.kind == "whole")


def _digits(text: str) -> str:
    """`seven` as 7, `0,5` as 0.5, `2 to 3` as 2:3."""
    if _ZERO_COMMA.fullmatch(text):
        return text.replace(",", ".")
    return _TO.sub(":", text) if _PROPORTION.fullmatch(text) else str(NUMBER_WORDS.get(text.lower(), text))
