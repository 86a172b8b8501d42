"""An answer taken apart: its formulas and numbers, each with the unit and the words beside it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from lowvram_grpo.rewards.figures import number
from lowvram_grpo.rewards.notation import DOLLAR
from lowvram_grpo.rewards.units import SCALES, Unit, unit_of, units_in

_TOKEN = re.compile(
    r"\\begin\{(\w+)\}.*?\\end\{\1\}|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\.\d+|[A-Za-z]{2,}\^\{\d\}|[A-Za-z]+(?:['’][A-Za-z]+)?|[\u4e00-\u9fff]+|\s+|.",
    re.DOTALL,
)
_SIGNS = re.compile(rf"[{DOLLAR}€£¥₹]")
_DEGREES = re.compile(r"(.*[\d})])\s*\^\\circ\s*([CF])?", re.DOTALL)
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
# `5 m`, `5 m/s`, `5 m^{2}`
_UNIT_LETTER = re.compile(r"(.*\d)\s+([A-Za-z])((?:\s*/\s*[a-z]|\^\{?\d\}?)*)", re.DOTALL)
_ATTACHED = re.compile(r"(?:.*=\s*)?[\d.]+([A-Za-z])", re.DOTALL)
_SCALE = re.compile(r"([a-z]+|[百千万亿]+)")
_WORDS = re.compile(r"[A-Za-z]+|[\u4e00-\u9fff]+")
_SEPARATORS = frozenset([",", ";", "and", "or", "&", "和", "或", "与", "及", r"\quad", r"\\", "\n"])
_STRONG = re.compile(
    r"\d|\\(?!ldots|to(?![A-Za-z])|quad|,)[A-Za-z]+|[A-Za-z]\s*[=<>^_+*/]|[=<>+*/-]\s*[A-Za-z]|\([a-zA-Z]\)"
)
# Words that say nothing about what is counted.
_FILLERS = frozenset(
    """
    a an the of in is are was be it its he she they we you i has have had gets get there that this total altogether all
    left remaining more about approximately approx roughly around exactly only just per each every to for at by on with
    from answer final result value equals equal so thus therefore then now will can would be needs must makes made
    number amount cost costs price one equation solution solutions solve where long away old or and
    个 的 是 为 有 共 一共 总共 约 只 名 条 本 张 件 位 辆 颗 棵 把 支
    """.split()  # noqa: SIM905
)
_NEGATION = re.compile(
    r"(?:\b(?:not|never|neither|nor)|n't|不是?)(?:\s+(?:equal to|exactly|about|just))?\s*$", re.IGNORECASE
)
_MEASURE_WORD = re.compile("^[个的只名条本张件位辆颗棵把支朵头匹]+(?=.)|(?:多|左右)$")
_OPERATOR = re.compile(r"[-+*/^]|\\(?:times|cdot)(?![A-Za-z])")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])\s*")


class Piece(NamedTuple):
    """One formula of an answer.

    Attributes:
        expr: the formula, normalized, without unit.
        unit: the unit before or behind it.
        nouns: the other words behind it, in lower case and singular.
        label: the words before it, alike.
        linked: whether only units and separators stand between this piece and the one before.
        negated: whether "not" stands right before it.
        attached: a letter that stands behind the number without a space, which may be a unit or a variable.
        computed: whether it is the result of a calculation: `48+24 = 72`, `20 seconds - 2 seconds = 18 seconds`.
        lead: all text between the formula before and this one.
    """

    expr: str
    unit: Unit | None = None
    nouns: frozenset[str] = frozenset()
    label: frozenset[str] = frozenset()
    linked: bool = True
    negated: bool = False
    attached: str = ""
    computed: bool = False
    lead: str = ""


@lru_cache(maxsize=4096)
def pieces(text: str) -> tuple[Piece, ...]:
    """The formulas of a normalized text in order, with `and`, `or`, commas and words between them."""
    if number(text):
        return (Piece(text),)
    found: list[Piece] = []
    before: list[str] = []
    run: list[str] = []
    after: list[str] = []
    clean = True  # nothing but separators since the last unit
    item = 0  # where the pieces since the last separator begin
    gap: list[str] = []
    lead = ""

    def close() -> None:
        nonlocal run, after, before, clean, lead
        expr = "".join(run).strip()
        if expr:
            piece, links = _piece(expr, "".join(before), "".join(after))
            linked = clean and bool(found)
            computed = _is_calculation(expr, continued=len(found) > item)
            if len(found) > item and "=" in expr:
                # The result of `20 seconds - 2 seconds = 18 seconds`.
                linked = linked and all(part.linked for part in found[item:])
                piece = piece._replace(expr=piece.expr.rsplit("=", 1)[-1].strip())
                expr, lead = "", found[item].lead
                del found[item:]
            lead += ":" * expr.startswith(":")
            found.append(piece._replace(linked=linked, computed=computed, lead=lead))
            clean, before = links, []
        elif after:
            before += after
            clean = clean and not "".join(after).strip()
        run, after = [], []

    tokens = _classified(text)
    for token, kind in tokens:
        if kind == "math":
            if after and "".join(after).strip():
                close()
            elif after:
                run += after
                after = []
            if not "".join(run).strip():
                lead = "".join(gap)
            gap = []
            run.append(token)
            continue
        gap.append(token)
        if kind == "space":
            (after if after or not run else run).append(token)
        elif kind == "separator":
            close()
            item = len(found)
        elif kind == "stop":
            close()
            item, clean = len(found), False
        else:
            after.append(token)
    close()
    wordy = len(found) > 1 or any(kind == "word" for _, kind in tokens)
    return tuple(p for p in found if _STRONG.search(p.expr) or (p.expr and not wordy))


def _classified(text: str) -> list[tuple[str, str]]:
    """Tokens as "math", "word", "separator" (of list items), "stop" (end of a sentence) or "space"."""
    tokens = [m.group() for m in _TOKEN.finditer(text)]
    solid = [t for t in tokens if not t.isspace()]
    wordy = any(_is_word(t) for t in solid)
    out, depth = [], 0
    for i, token in enumerate(tokens):
        before = tokens[i - 1] if i else ""
        behind = tokens[i + 1] if i + 1 < len(tokens) else ""
        if token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth = max(0, depth - 1)
        if token.isspace():
            kind = "separator" if "\n" in token else "space"
        elif depth:
            # `(5 apples)` is a remark, `(1, 2)` and `f(ab)` are not.
            kind = "word" if _is_word(token) and not _in_braces(out) and token not in ("and", "or") else "math"
        elif token in _SEPARATORS:
            kind = "separator"
        elif out and out[-1][1] == "word" and (token == "/" or (out[-1][0] == "/" and token.isalpha())):
            kind = "word"  # `km/h`
        elif token == "/" and behind and _is_word(behind):
            kind = "word"  # `$28/month`
        elif token[0].isdigit() and before and _is_word(before) and before.isascii():
            kind = "word"  # `mp3`
        elif token == "." and before[-1:].isdigit() and behind[:1] in ("\\", "("):
            kind = "math"  # `0.\overline{3}`
        elif token == "." or token == "?":
            kind = "stop"
        elif re.fullmatch("d[xytuvrsz]", token):
            kind = "math"
        elif _is_word(token):
            glued = before and (before[-1].isdigit() or before in tuple(")}^_=+-*/") or before.startswith("\\"))
            variables = token.isascii() and len(token) <= 3 and unit_of(token) is None and not _is_vowelled(token)
            kind = "math" if variables and (glued or behind in tuple("^_+*/=(") or len(solid) == 1) else "word"
        elif token.isalpha() and token.isascii() and wordy:
            kind = "math" if _is_variable(tokens, i) else "word"
        else:
            kind = "math"
        out.append((token, kind))
    return out


def _is_word(token: str) -> bool:
    return token[0] >= "\u4e00" or (token[0].isalpha() and token[0].isascii() and len(token) > 1)


def _is_vowelled(token: str) -> bool:
    return len(token) > 2 and bool(re.search("[aeiou]", token.lower()))


def _in_braces(out: list[tuple[str, str]]) -> bool:
    depth = 0
    for token, _ in reversed(out):
        depth += token in ("{", r"\{")
        depth -= token in ("}", r"\}")
        if depth > 0:
            return True
    return False


def _is_variable(tokens: list[str], i: int) -> bool:
    """Whether a single letter among words belongs to a formula: it touches a digit, an operator or a command."""
    before = "".join(tokens[max(0, i - 2) : i])
    behind = "".join(tokens[i + 1 : i + 3])
    touches = re.search(r"(?:[\d)}]|[=<>+*/^_|-]\s?|\\[A-Za-z]+\s?)$", before)
    return bool(touches or re.match(r"\s?[=<>^_+*/|-]|\(|\s?\\(?:leq|geq|neq|in|cdot|times|approx)", behind)) and not (
        # The unit of `5 m`: behind a space.
        tokens[i - 1].isspace() and re.search(r"\d\s$", before) and unit_of(tokens[i])
    )


def _piece(expr: str, before: str, after: str) -> tuple[Piece, bool]:
    """The piece, and whether what stands behind it is a unit and nothing else."""
    expr = _balanced(expr)
    if after and expr.endswith("-"):  # `5-digit`
        expr = expr[:-1].strip()
    if re.match(r"-\s+\d", expr) and before.strip():  # a dash
        expr = expr[1:].strip()
    glued = bool(after.strip()) and not after[0].isspace()
    expr, sign = _unit_sign(expr)
    if not sign and (letter := _UNIT_LETTER.fullmatch(expr)) and unit_of(letter[2]):
        expr, after, glued = letter[1], f"{letter[2]}{letter[3]} {after}", False
    words = after.strip()
    if (scale := _SCALE.match(words)) and scale[1] in SCALES and (plain := number(expr)):
        expr, words = str(plain.value * SCALES[scale[1]]), words[scale.end() :].strip()
    unit, rest = units_in(f"{sign} {words}", attached=glued and not sign)
    money = before.split()[-1] if before.split() else ""
    if unit is None and len(money) > 1:  # `Rs. 500`
        unit = unit_of(money)
    attached = _ATTACHED.fullmatch(expr) if unit is None else None
    label = _content(tuple(_WORDS.findall(before)))
    negated = bool(_NEGATION.search(before))
    return Piece(expr, unit, _content(rest), label, True, negated, attached[1] if attached else ""), not rest


def _is_calculation(expr: str, *, continued: bool) -> bool:
    """Whether numbers are put together on its left side, or before it (`continued`), and one is on its last side."""
    left, equals, result = expr.rpartition("=")
    if not equals or left.endswith(("<", ">", "!", ":")) or not re.search(r"\d", result):
        return False
    first = re.search(r"\d", left)
    return continued or bool(first and (r"\frac" in left or _OPERATOR.search(left, first.end())))


def _unit_sign(expr: str) -> tuple[str, str]:
    """The formula without the sign of its unit, and the sign: that of a currency, `%`, `^\\circ`."""
    if sign := _SIGNS.search(expr):
        return re.sub(r"\s+", " ", _SIGNS.sub("", expr)).strip(), sign.group()
    if re.fullmatch(r".*[\d)}\]]\s*%", expr, re.DOTALL):
        return expr[:-1].strip(), "%"
    if (degrees := _DEGREES.fullmatch(expr)) and not _TRIG.search(expr):
        return degrees[1].strip(), "^\\circ" + (degrees[2] or "")
    return expr, ""


def _content(words: tuple[str, ...]) -> frozenset[str]:
    """What is counted: without fillers, in lower case and singular."""
    kept = (_MEASURE_WORD.sub("", word.lower().removesuffix("'s")) for word in words)
    return frozenset(
        _singular(word) for word in kept if word and word not in _FILLERS and (len(word) > 1 or word >= "\u4e00")
    )


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def _balanced(expr: str) -> str:
    """Without the operators and brackets at its ends that belong to the words around it."""
    while True:
        # A trailing `=` stays: what it announces was never written.
        stripped = expr.strip().lstrip(" ,;:=*/&").rstrip(" ,;:&").removeprefix(r"\approx")
        if stripped.count("(") > stripped.count(")") and stripped.endswith("("):
            stripped = stripped[:-1]
        elif stripped.count(")") > stripped.count("(") + stripped.count("["):
            stripped = stripped[:-1] if stripped.endswith(")") else stripped
        elif re.fullmatch(r"\(\s*[\d.]+\s*\)", stripped):
            stripped = stripped[1:-1]
        if stripped == expr:
            return expr
        expr = stripped


def expanded(piece: Piece) -> tuple[Piece, ...]:
    r"""Both values of a `\pm`, the piece alone without one."""
    if len(_PLUS_MINUS.findall(piece.expr)) != 1:
        return (piece,)
    return tuple(
        piece._replace(expr=re.sub(r"(^|[=(]\s*)\+\s*", r"\1", _PLUS_MINUS.sub(sign, piece.expr))) for sign in "+-"
    )
