r"""Which of an answer's formulas is its result, where a reply writes its way to it: `48/2 = 24, 48+24 = 72`.

Rather none than a wrong one: where words leave it open which number is meant, all of them stay, and several equal no
single one.
"""

from __future__ import annotations

import re

from lowvram_grpo.rewards.comparison import same_formula
from lowvram_grpo.rewards.extraction import Kind
from lowvram_grpo.rewards.figures import number
from lowvram_grpo.rewards.notation import DOLLAR
from lowvram_grpo.rewards.pieces import Piece

_ARROW = re.compile(r"\s*(?:=>|->|[⇒➜➔⟹]|\\(?:to|[rR]ightarrow|implies|Longrightarrow)(?![A-Za-z]))\s*")
# `48/2=24 48+24=72`: a number behind a result begins the next equation.
_NEXT = re.compile(r"(=\s*-?[\d.]+)\s+(?=[\d.]+\s*(?:[-+*/]|\\times|\\cdot)[^=]*=)")
# No factor: `he averages (60+72+42)/3`.
_REMARK = re.compile(r"\s*\(([^()]*)\)(?!\s*[-+*/^=\\\d])")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!sin|cos|tan|log|ln|mod|base|sqrt)[A-Za-z]{2,}|[\u4e00-\u9fff]")
# Such a remark takes back or adds to what stands before it.
_SECOND_THOUGHT = re.compile(
    r"\s*(?:or|and|plus|no|wait|actually|but|maybe|about|approx\w*|rather|correct\w*|should|sometimes|up to|"
    r"now|mod|base|per|more|less|at|through|to|或|和|应|不|大约)(?![A-Za-z])"
    r"|\s*\\|.*\b(?:should|wrong|instead|mistake|rather|or)\b",
    re.IGNORECASE,
)
_NAMED_TOTAL = re.compile(r"\btotal(?: [a-z]+)? (?:is|was|=)\s*$|\btotal(?: [a-z]+)?: *$", re.IGNORECASE)
_TOTAL = re.compile(
    r"\b(?:total|sum|altogether|in all|overall)\b[^\d,;.?]*$|(?:一共|总共|共|总计|合计)[^,;.]*$", re.IGNORECASE
)
# What may stand between a result and a number that only says for what, when or how long it is.
_ASIDE = re.compile(
    r"\b(?:in|on|for|after|of|over|with|at|during|within|before|until|to (?!(?:get|give|make|find|reach)\b)[a-z]+)\b",
    re.IGNORECASE,
)
_OPERAND = re.compile(r"\b(?:to|from|by|than|as|times|plus|minus)\s*$", re.IGNORECASE)
_NEW_CLAUSE = re.compile(
    r"[,;:.?!=]|\b(?:is|are|was|were|be|been|equals?|makes?|making|gives?|giving|leaves?|leaving|becomes?|gets?|got|getting|"
    r"so|thus|therefore|then|hence|or|but|which|who|means?|meaning|has|have|had|total|altogether|sum|results?|"
    r"instead|not|if|when|while|because|since|add\w*|subtract\w*|multipl\w*|divid\w*|plus|minus|times|more|less|fewer|"
    r"another|others?|each|half|twice|average|costs?|needs?|sold|bought|paid|pays?|earn\w*|receiv\w*|spen[dt]\w*)\b|[\u4e00-\u9fff]",
    re.IGNORECASE,
)
_SAYS = re.compile(r"\s*(?:is|are|makes?|equals?|gives?)(?: equal to| about)?\s*", re.IGNORECASE)
_SO = re.compile(r"[\s,;]*(?:so|thus|therefore|hence)\b", re.IGNORECASE)
_SOLVED = re.compile(r"([A-Za-z])\s*=\s*-?(?:[\d.]+(?:\s*/\s*\d+)?|\\frac\{\d+\}\{\d+\})")
_NAMELY = re.compile(r":\s*$|\b(?:i\.\s?e|that is|namely)\b[^\d]{0,3}$", re.IGNORECASE)
_OPERATED = re.compile(r"[\d.\s()]+(?:(?:[-+*/]|\\times|\\cdot)[\d.\s()]+)+")


def conclusion(text: str, gold: str) -> str:
    """A normalized answer without the steps and remarks that are none of its formulas; `gold` may have their like."""
    if not _ARROW.search(gold):
        start = 0
        for arrow in _ARROW.finditer(text):
            before = text[: arrow.start()]
            # Not the arrow of a limit.
            if before.count("{") == before.count("}") and re.search(r"\d", before):
                start = arrow.end()
        text = text[start:] or text
    text = _NEXT.sub(r"\1, ", text)
    return text if "(" in gold or "(" not in text else _without_remarks(text)


def _without_remarks(text: str) -> str:
    """`72 clips (48 in April and 24 in May)` as `72 clips`."""

    def dropped(match: re.Match[str]) -> str:
        inner, before = match[1], text[: match.start()]
        if not re.search(r"\d", before) or not re.search(r"[\w%}]$", before):
            return match.group()
        if _SECOND_THOUGHT.match(inner):
            return match.group()
        if not re.search(r"\d", inner):
            # The unit between two equations: `48/2 = 24(个), 48+24 = 72(个)`.
            return f" {inner} " if re.fullmatch(r"[\u4e00-\u9fff]{1,3}", inner) else match.group()
        if _WORD.search(inner) or ("=" in inner and match.group()[0] == " "):
            return " "
        worded = re.search(r"[A-Za-z]{3,}$|[\u4e00-\u9fff]$", before) and not re.search(r"\\[A-Za-z]+$", before)
        last = re.search(rf"(?:^|\s){DOLLAR}?(-?[\d.]+)$", before)
        sum_ = inner.replace(DOLLAR, "")
        same = last and match.group()[0] == " " and _OPERATED.fullmatch(sum_) and same_formula(last[1], sum_)
        return " " if (worded and match.group()[0] == " ") or same else match.group()

    return _REMARK.sub(dropped, text).strip()


def result_of(found: tuple[Piece, ...], kind: Kind) -> tuple[Piece, ...]:
    """What of an answer is compared with a reference of one formula: one piece if it is clear which, else several."""
    # "8, not 7" is 8.
    found = tuple(piece for piece in found if not piece.negated) or found
    if len(found) < 2:
        return found
    if any(re.search(r"\b(?:or|vs)\b|或", piece.lead) for piece in found[1:]):
        return group_of(found, kind)
    *before, end = found
    if kind != "announced":
        if _solves(end, before):
            return (end,)
        if (at := _broken_down(found)) is not None:
            return (found[at],)
    if kind == "prose":
        last = max((i for i, piece in enumerate(found) if piece.computed), default=None)
        if last is not None and _only_asides(found[last + 1 :]):
            return (found[last],)
        totals = [i for i, piece in enumerate(found) if _NAMED_TOTAL.search(piece.lead)]
        if len(totals) == 1 and not any(
            _NEW_CLAUSE.search(piece.lead.strip(" ,:")) for piece in found[totals[0] + 1 :]
        ):
            return (found[totals[0]],)
        return group_of(found, kind)
    group = found[: _first(found)] if kind == "announced" else found
    if len(group) > 1 and all(_is_step(piece) for piece in group):
        return group[-1:]
    if _TOTAL.search(end.lead):
        return (end,)
    if kind == "whole":
        if number(end.expr) and _SO.match(end.lead) and all(piece.computed for piece in before):
            return (end,)
        if number(end.expr) and _SAYS.fullmatch(end.lead) and (len(before) > 1 or _OPERATED.fullmatch(before[0].expr)):
            return (end,)
        steps = sum(_is_step(piece) for piece in found)
        if steps and all(map(_is_step, found[:steps])) and _only_asides(found[steps:]):
            return (found[steps - 1],)
    return group_of(found, kind)


def _is_step(piece: Piece) -> bool:
    """Whether it is a calculation and its result. Of `x = 1+1 = 2, y = 3` both may be meant."""
    return piece.computed and not re.match(r"\s*[A-Za-z]\s*=", piece.expr)


def _solves(end: Piece, before: list[Piece]) -> bool:
    """Whether `x = 5` stands behind equations that are about x: `2x = 10`, but no other value of it."""
    solved = _SOLVED.fullmatch(end.expr)
    unknown = re.compile(rf"\d\s*\*?\s*{solved[1]}(?![A-Za-z])|(?<![A-Za-z]){solved[1]}\s*[-+*/^]") if solved else None
    return bool(solved) and all("=" in piece.expr and unknown.search(piece.expr) for piece in before)


def _broken_down(found: tuple[Piece, ...]) -> int | None:
    """Where the number stands whose parts follow it and sum up to it: `72 clips: 48 in April and 24 in May`."""
    for i in range(len(found) - 2):
        if _NAMELY.search(found[i + 1].lead):
            values = [number(piece.expr) for piece in found[i:]]
            same = all(values) and values[0].value == sum(value.value for value in values[1:])
            return i if same else None
    return None


def group_of(found: tuple[Piece, ...], kind: Kind) -> tuple[Piece, ...]:
    """The pieces that are the answer: all, or of a text the first or last ones that are linked to each other."""
    found = tuple(piece for piece in found if not piece.negated) or found
    if kind == "whole" or len(found) < 2:
        return found
    return found[: _first(found)] if kind == "announced" else found[_last(found) :]


def _first(found: tuple[Piece, ...]) -> int:
    return next((i for i in range(1, len(found)) if not found[i].linked), len(found))


def _last(found: tuple[Piece, ...]) -> int:
    return next((i for i in range(len(found) - 1, 0, -1) if not found[i].linked), 0)


def _only_asides(behind: tuple[Piece, ...]) -> bool:
    """Whether the numbers behind a result belong to it: `= 50 miles for 5 days`, not `= 12 from 50 leaves 38`."""
    if not behind:
        return True
    if any(re.search(r"\band\b", piece.lead) for piece in behind[:-1]):
        return False
    if not all(number(piece.expr) for piece in behind) or not _ASIDE.search(behind[0].lead):
        return False
    return not any(_NEW_CLAUSE.search(piece.lead) or _OPERAND.search(piece.lead) for piece in behind)
