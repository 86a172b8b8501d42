"""Answers that are a letter of a multiple choice or a word: which references are, and whether a reply says the same."""

from __future__ import annotations

import re
from functools import lru_cache

from lowvram_grpo.rewards.extraction import Answer
from lowvram_grpo.rewards.notation import FUNCTIONS, normalize

_LETTER = re.compile(r"[(\[]?\s*([A-Z])\s*[)\].:]?")
_LETTERS = re.compile(
    r"[(\[]?[A-J][)\]]?(?:(?:\s*[,;/&]\s*|\s+and\s+|\s*和\s*|\s+)(?:and\s+)?[(\[]?[A-J][)\]]?)+|[A-J]{2,}"
)
_OPTION = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:answer|option|choice|选项)\s*(?:is|:)?\s*)?"
    r"(?:[(\[]\s*([A-J])\s*[)\]][.:]?|([A-J])(?:\s*[).:,]|\s+-))\s*(\S.*)?",
    re.IGNORECASE | re.DOTALL,
)
_REASONED = re.compile(r"[(\[]?([A-J])[)\].]?\s*\((?:since\b|because\b|as\b|因为)[^()]*\)", re.IGNORECASE)
_NAMED = re.compile(r"(?i:option|choice|answer|选项?|选择)\s*(?:is\s+)?[(\[]?([A-J])(?![A-Za-z])|[(\[]([A-J])[)\]]")
# "A" and "I" are words of a sentence, too.
_LONE = re.compile(r"(?<![A-Za-z'])(A(?!\s+(?!(?:and|or|is)\b)[a-z])|[B-HJ])(?![A-Za-z'])")
_COMMAND = re.compile(r"\s*\$*\\(?:text|textbf|textit|mathrm|mathbf|mbox|textrm|boxed)\s*\{[^{}]*\}\$*\s*")
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_HAN = re.compile(r"[\u4e00-\u9fff]{1,8}")
_PHRASE_LIST = """
no solution, no solutions, no real solution, no real solutions, no real roots, no answer, no such number,
none of the above, all of the above, none of these, does not exist, do not exist, not possible, not defined,
not enough information, insufficient information, cannot be determined, not given, not applicable, not a function,
not true, never true, always true, sometimes true, infinitely many, infinitely many solutions, infinite solutions,
all real numbers, all reals
"""
_PHRASES = frozenset(phrase.strip() for phrase in _PHRASE_LIST.split(","))
_SAME = {
    "dne": "does not exist", "t": "true", "f": "false", "y": "yes", "n": "no", "no solutions": "no solution",
    "can't be determined": "cannot be determined", "can not be determined": "cannot be determined",
    "all reals": "all real numbers", "infinite solutions": "infinitely many solutions",
    "是的": "是", "不是": "否", "对的": "对", "正确": "对", "不对": "错", "错误": "错",
}  # fmt: skip
_ARTICLE = re.compile(r"^(?:the|an?|it is|it's|they are|he is|she is)\s+(?=\S)")
_TERMINAL = re.compile(
    r"(?:\b(?:is|are|be|was|were|on|get|obtain|conclude|choose)\b|:|=|是(?!否)|为)\s*(?:the |an? )?([^\s:=].*)$",
    re.IGNORECASE | re.DOTALL,
)
_LEADING = re.compile(
    r"(yes|no|true|false|是的|是|否|不是|对|错)(?=[,.;:!]|\s*$|\s+because|\s+since|，|。)", re.IGNORECASE
)
_NEGATED = re.compile(r"\b(?:not|isn't|never|nor)\b|n't\b|不", re.IGNORECASE)
_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty
"""
NUMBER_WORDS = {word: n for n, word in enumerate(_NUMBERS.split())} | {
    word: 10 * n for n, word in enumerate(("thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), 3)
}


def letters(text: str) -> frozenset[str] | None:
    """The choices that a reference of letters alone names: `B`, `(B)`, `A, C`, `ACD`; None for any other text."""
    text = re.sub(
        r"^(?:[Oo]ption|[Cc]hoice|(?:故|应|本题|因此|所以)?选[项择]?(?:是|为)?)\s*:?\s*(?=\W?[A-J])|(?<=[A-J])选?项$",
        "",
        text,
    )
    if match := _LETTER.fullmatch(text):
        return frozenset(match[1])
    if _LETTERS.fullmatch(text):
        named = re.findall("[A-J]", text)
        if "".join(named) != text or named == sorted(set(named)):
            return frozenset(named)
    return None


def option(text: str) -> tuple[str, str] | None:
    """Letter and text of `B) 42`, `(B) Paris` or `B. 42`; None for anything else."""
    match = _OPTION.fullmatch(text)
    return ((match[1] or match[2]).upper(), (match[3] or "").strip()) if match else None


def chosen(answer: Answer, count: int) -> frozenset[str] | None:
    """The letters that a reply's answer chooses, None where it names none.

    Args:
        count: of the reference's letters; a reply that names several where one was asked for is several.
    """
    text = normalize(answer.text)
    if named := letters(text):
        return named
    if re.fullmatch(r"[(\[]?[a-j][)\].]?", text):
        return frozenset(text.strip("()[]. ").upper())
    if found := _REASONED.fullmatch(text):
        return frozenset(found[1].upper())
    if found := option(text):
        more = letters(found[1]) if found[1] else None
        return frozenset(found[0]) | (more or frozenset())
    if count > 1 and (found := re.match(_LETTERS, text)):
        return frozenset(re.findall("[A-J]", found.group()))
    if answer.kind == "announced" and (
        found := re.match(r"(?:option |choice )?[(\[]?([A-J])(?![A-Za-z'])[)\]]?", text)
    ):
        rest = text[found.end() :]
        # "The answer is A dog" names no choice, "... is B, 42" does.
        if not (found[1] in "AI" and re.match(r"\s+[a-z]", rest)):
            return frozenset(found[1]) | frozenset(
                re.findall(r"(?:and|or|,|和|或)\s*[(\[]?([A-J])(?![A-Za-z])", rest[:16])
            )
    if answer.kind == "whole" and re.search(r"[\d+*/^=<>\\]", text):
        return None
    for pattern in (_NAMED, _LONE):
        found = {a[0] if isinstance(a, str) else (a[0] or a[1]) for a in pattern.findall(text)}
        if len(found) == 1:
            return frozenset(found)
        if found:
            return frozenset(found) if count > 1 else None
    return None


@lru_cache(maxsize=1024)
def word(raw: str) -> str | None:
    r"""The word, in one form, that a reference is: one word, a few Han characters, a fixed phrase, or a `\text{...}`.

    Of "Yes, because ..." it is the first one.

    None where it is a sentence (`forty two` is one to TRL), a number, or a formula.
    """
    text = normalize(raw)
    leading = _LEADING.match(text)
    text = _form(leading[1] if leading else text)
    if not text or not re.search(r"[^\W\d_]{2}|[\u4e00-\u9fff]", text) or re.search(r"[\d\\=+<>]", text):
        return None
    single = _WORD.fullmatch(text) and text not in FUNCTIONS and text not in NUMBER_WORDS
    if single or _HAN.fullmatch(text) or text in _PHRASES or text in _SAME.values():
        return text
    return text if _COMMAND.fullmatch(raw) and len(text.split()) <= 8 else None


def says(answer: Answer, wanted: str) -> bool:
    """Whether the answer is the word `wanted`, as `word` gives it."""
    text = normalize(answer.text)
    candidates = [text]
    if found := option(text):
        candidates.append(found[1])
    if leading := _LEADING.match(text):
        candidates.append(leading[1])
    elif (ending := _TERMINAL.search(text)) and not _NEGATED.search(text[: ending.start(1)]):
        candidates.append(ending[1])
    if answer.kind == "prose" and (lines := [line for line in answer.text.splitlines() if line.strip()]):
        candidates.append(normalize(lines[-1]))
    return any(_form(candidate) == wanted for candidate in candidates)


def _form(text: str) -> str:
    text = re.sub(r"\s+", " ", text.replace("(", " ").replace(")", " ").replace('"', " ")).strip(" .,;:!?'").casefold()
    text = _ARTICLE.sub("", text)
    return _SAME.get(text, text)
