r"""Whether two answers are the same as a whole: every number, formula, unit and word of them.

Numbers are compared here and exactly; what is more than a number goes to math-verify, one formula at a time and all of
it. A unit that one side leaves out is no difference (`18 dollars` is 18), one that differs is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from lowvram_grpo.rewards import symbolic
from lowvram_grpo.rewards.figures import Number, number, same_based, same_clock, same_date, same_number, same_ratio
from lowvram_grpo.rewards.notation import same_text
from lowvram_grpo.rewards.pieces import Piece, expanded, pieces
from lowvram_grpo.rewards.units import Unit, same_money, unit_of

_PERCENT = unit_of("%")
# Money and weight have one name.
_POUNDS = {unit_of("pound"), unit_of("£")}
_EQUALS = re.compile(r"(?<![<>!\\:])=(?!=)|\\approx(?![A-Za-z])")
_COEFFICIENT = re.compile(r"-\s*[A-Za-z]|-?\s*(?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})\s*\*?\s*[A-Za-z]")
_UNKNOWN = re.compile(r"(?<![A-Za-z\\])[xyz](?![A-Za-z])")
_SUBSCRIPT = re.compile(r"_\{?\w+\}?")
_SYMBOL = re.compile(r"\s*(?:\\[A-Za-z]+|[A-Za-z])(?:_\{?\w+\}?)?(?:\s*\([\w\s,]*\))?\s*")
_ARITHMETIC = re.compile(r"(?:[\d.\s()+*/^{}-]|\\(?:times|cdot|frac)(?![A-Za-z]))+")
_OPENING, _CLOSING = "([{", ")]}"
_TRIG_DEGREES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d+\}?)?)\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\\circ\s*[)}]?"
)
_NO_FORMULA = re.compile(r"[\u4e00-\u9fff]|(?<![\\A-Za-z{])[A-Za-z]{4,}")


def same_pieces(gold: Sequence[Piece], reply: Sequence[Piece], *, strict: bool) -> bool | None:
    """Whether two lists of formulas agree, in any order; None where math-verify can't read one of `gold`.

    Args:
        strict: the reply's words are an answer's, not those of a sentence around it, so what is counted must agree.
    """
    if len(gold) == len(reply):
        verdict = _matched(gold, reply, strict)
        if verdict is not False:
            return verdict
    if len(gold) == 1 < len(reply) and (point := _coordinates(gold[0].expr)) and point[0] == "()":
        # `2, 3` for the point (2, 3): in its order.
        return len(point[1]) == len(reply) and all(
            same_pieces(pieces(item), [piece], strict=strict) for item, piece in zip(point[1], reply)
        )
    both = (_compound(gold), _compound(reply))
    if (len(gold) > 1 or len(reply) > 1) and all(both):
        return same_number(Number(both[0], True), Number(both[1], True))
    wide, found = _flat(gold), _flat(reply)
    if (len(wide), len(found)) != (len(gold), len(reply)) and len(wide) == len(found):
        return _matched(wide, found, strict)
    return False


def _flat(group: Sequence[Piece]) -> list[Piece]:
    r"""With the members of a set `\{1, 2\}` one by one, and both values of a `\pm`."""
    if len(group) == 1 and (inner := re.fullmatch(r"(?:[a-zA-Z]\s*(?:=|\\in)\s*)?\\\{(.*)\\\}", group[0].expr)):
        group = [Piece(item) for item in _items(inner[1])]
    return [one for piece in group for one in expanded(piece)]


def _matched(gold: Sequence[Piece], reply: Sequence[Piece], strict: bool) -> bool | None:
    """Each of `gold` with one of its own of `reply`."""
    left, unread = list(reply), False
    labelled = len(gold) > 1 and all(p.label for p in (*gold, *reply))
    for wanted in gold:
        for i, found in enumerate(left):
            if labelled and not wanted.label & found.label:
                continue
            verdict = same_piece(wanted, found, strict=strict)
            unread |= verdict is None
            if verdict:
                del left[i]
                break
        else:
            return None if unread and len(gold) == 1 else False
    return True


def same_piece(gold: Piece, reply: Piece, *, strict: bool) -> bool | None:
    """Whether formula, unit and what is counted agree."""
    if gold.negated != reply.negated:
        return False
    scale = Fraction(1)
    if gold.attached and reply.unit:
        gold = _with_unit(gold)
    elif reply.attached and not gold.attached and number(gold.expr) and not gold.nouns:
        reply = _with_unit(reply)
    if gold.unit and reply.unit and not _same_unit(gold.unit, reply.unit):
        if gold.unit.dimensions != reply.unit.dimensions:
            return False
        scale = reply.unit.factor / gold.unit.factor
    elif (gold.unit == _PERCENT) != (reply.unit == _PERCENT):
        return _same_percent(gold, reply)
    elif strict and (gold.unit is None or reply.unit is None):
        # Two words that name what is counted, and not the same.
        said, asked = reply.nouns | _unit_words(reply), gold.nouns | _unit_words(gold)
        if asked and said and not asked & said:
            return False
    if scale == 1:
        return same_formula(gold.expr, reply.expr)
    wanted, found = _value(gold.expr), _value(reply.expr)
    return bool(wanted and found) and same_number(wanted, Number(found.value * scale, True))


def _unit_words(piece: Piece) -> frozenset[str]:
    return frozenset(name for name, _ in piece.unit.dimensions) if piece.unit else frozenset()


def _same_unit(gold: Unit, reply: Unit) -> bool:
    return gold == reply or {gold, reply} == _POUNDS or same_money(gold, reply)


def _with_unit(piece: Piece) -> Piece:
    """`5m` as five metres: where the other side has a unit, or is a number; else it is five times m."""
    unit = unit_of(piece.attached)
    return piece if unit is None else piece._replace(expr=piece.expr[:-1], unit=unit, attached="")


def _same_percent(gold: Piece, reply: Piece) -> bool | None:
    """One side has a percent sign: 50 % is 0.5, and 50 where the sign was left out. Never 0.5 % for 0.5."""
    wanted, found = _value(gold.expr), _value(reply.expr)
    if wanted is None or found is None:
        return same_formula(gold.expr, reply.expr)
    if abs(wanted.value) >= 1 and same_number(wanted, found):
        return True
    hundredth = Fraction(1, 100)
    if gold.unit == _PERCENT:
        return wanted.value == 0 == found.value or same_number(Number(wanted.value * hundredth, wanted.decimal), found)
    return wanted.value == 0 == found.value or same_number(wanted, Number(found.value * hundredth, found.decimal))


def _value(expr: str) -> Number | None:
    """The number on the last side of an equation."""
    return number(_equation(expr)[-1])


def _compound(group: Sequence[Piece]) -> Fraction | None:
    """The sum of `2 hours 30 minutes` or `5 dollars and 30 cents`, each unit smaller than the last; else None."""
    total, last = Fraction(0), None
    for piece in group:
        value = number(piece.expr)
        if value is None or piece.unit is None or value.value < 0 or piece.unit == _PERCENT:
            return None
        if last and (piece.unit.dimensions != last.dimensions or piece.unit.factor >= last.factor):
            return None
        total, last = total + value.value * piece.unit.factor, piece.unit
    return total if last else None


def same_formula(gold: str, reply: str) -> bool | None:
    """Whether two formulas without units are equal; None where math-verify can't read `gold`."""
    if same_text(gold, reply):
        return True
    gold, reply = _sides(gold, reply)
    if not reply or not gold:
        return False
    if same_text(gold, reply):
        return True
    wanted, found = number(gold), number(reply)
    if wanted and found:
        return same_number(wanted, found)
    for same in (same_based, same_ratio):
        if (verdict := same(gold, reply)) is not None:
            return verdict
    if (bracketed := _same_bracketed(gold, reply)) is not None:
        return bracketed
    if _NO_FORMULA.search(re.sub(r"\\begin\{\w+\}|\\end\{\w+\}|\\math\w+\{\w+\}", "", reply)):
        reply = r"\emptyset"  # no formula: only whether `gold` can be read is asked
        return None if symbolic.equal(_plain(gold), reply) is None else False
    return symbolic.equal(_plain(gold), _plain(reply))


def _sides(gold: str, reply: str) -> tuple[str, str]:
    """Both without what they are set equal to, as far as the other one allows.

    `x = 5` answers 5 and the other way round, but not `y = 5`; `2x = 10` is no 10. The end of a calculation counts.
    """
    wanted, found = _equation(gold), _equation(reply)
    if len(wanted) == 1 and len(found) > 1:
        if _is_condition(found):
            return gold, ""
        last = found[-1].strip()
        if (first := number(found[0])) and (value := number(last)) and not same_number(first, value):
            return gold, ""
        # `5 = x`, and `72 = 48 + 24`, which says 72 even where the sum is wrong.
        stated = _SYMBOL.fullmatch(last) or (not number(last) and _ARITHMETIC.fullmatch(last))
        if len(found) == 2 and number(gold) and stated and number(found[0]):
            last = found[0].strip()
        return gold, last
    if len(found) == 1 and len(wanted) > 1:
        return (gold, reply) if _is_condition(wanted) else (wanted[-1].strip(), reply)
    if len(wanted) > 1 and len(found) > 1:
        if same_text(wanted[0].strip(), found[0].strip()):
            return wanted[-1].strip(), found[-1].strip()
        if number(wanted[-1]) and number(found[-1]) and not _SYMBOL.fullmatch(wanted[0]):
            return wanted[-1].strip(), found[-1].strip() if not _SYMBOL.fullmatch(found[0]) else reply
    return gold, reply


def _is_condition(sides: list[str]) -> bool:
    """Whether an equation says something about an unknown, `2x = 10` or `x^2 + y^2 = 1`, and not what something is."""
    first = sides[0].strip()
    if len(sides) > 2:
        return False
    unknown = _UNKNOWN.search(re.sub(r"(?<=\d)(?=[xyz])", " ", first))
    return bool(_COEFFICIENT.fullmatch(first) or (unknown and re.search(r"\d|\^", _SUBSCRIPT.sub("", first))))


def _equation(expr: str) -> list[str]:
    """Its sides: what stands between equals signs that no brace encloses."""
    sides, start = [], 0
    for match in _EQUALS.finditer(expr):
        if expr.count("{", 0, match.start()) == expr.count("}", 0, match.start()):
            sides.append(expr[start : match.start()])
            start = match.end()
    return [*sides, expr[start:]]


def _same_bracketed(gold: str, reply: str) -> bool | None:
    """Points and intervals, coordinate by coordinate; None where one of them is neither."""
    wanted, found = _coordinates(gold), _coordinates(reply)
    if wanted is None or found is None:
        return None
    if wanted[0] != found[0] or len(wanted[1]) != len(found[1]):
        return False
    verdicts = [same_pieces(pieces(a), pieces(b), strict=True) for a, b in zip(wanted[1], found[1])]
    if all(verdicts):
        return True
    return None if None in verdicts and False not in verdicts else False


def _coordinates(expr: str) -> tuple[str, list[str]] | None:
    r"""Both brackets and the items of `(1, 2)`, `[1, 2)` or `\langle 1, 2 \rangle`."""
    expr = expr.replace(r"\langle", "(").replace(r"\rangle", ")").strip()
    if len(expr) < 3 or expr[0] not in "([" or expr[-1] not in ")]":
        return None
    depth = 0
    for i, ch in enumerate(expr):
        depth += (ch in _OPENING) - (ch in _CLOSING)
        if depth == 0 and i < len(expr) - 1:
            return None
    items = _items(expr[1:-1])
    return (expr[0] + expr[-1], items) if len(items) > 1 and all(items) else None


def _items(text: str) -> list[str]:
    """Parts between the commas and semicolons that no bracket encloses."""
    items, depth, start = [], 0, 0
    for i, ch in enumerate(text):
        depth += (ch in _OPENING) - (ch in _CLOSING)
        if ch in ",;" and depth == 0:
            items.append(text[start:i].strip())
            start = i + 1
    return [*items, text[start:].strip()]


def _plain(expr: str) -> str:
    r"""For math-verify, which reads `\cos 60^\circ` as the cosine of 60, `4 i` not as `4i`, `2 1/2` as 1.5."""
    if ("overline" in expr or "dot" in expr) and (cyclic := number(expr)):
        return rf"\frac{{{cyclic.value.numerator}}}{{{cyclic.value.denominator}}}"
    expr = re.sub(r"(?<=\d) (?=[a-z](?![a-z]))", "", expr)
    expr = re.sub(r"(?<![\d.}])(\d+) (\d+)/(\d+)", r"(\1+\\frac{\2}{\3})", expr)
    return _TRIG_DEGREES.sub(r"\1(\\frac{\2 \\pi}{180})", expr)


def same_moment(gold: str, reply: str) -> bool | None:
    """Whether two dates or times of day agree; None where one of them is neither."""
    for same in (same_date, same_clock):
        if (verdict := same(gold, reply)) is not None:
            return verdict
    return None
