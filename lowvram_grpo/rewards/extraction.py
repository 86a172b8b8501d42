r"""Which part of a reply is its answer: behind the thought, between tags, in a box, announced, or at the end."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Literal, NamedTuple

from lowvram_grpo.rewards.notation import normalize, strip_markdown
from lowvram_grpo.rewards.tags import answer_text

Kind = Literal["whole", "announced", "prose"]

_TAGS = re.compile(r"</?(?:think|answer)>")
_BRACE = re.compile(r"(?<!\\)[{}]")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)|\\boxed\s*(?=\d)")
_ANNOUNCED = re.compile(
    r"(?:\b[Aa]ns(?:wer)?|ANSWER|\b(?:correct|right|best)\s+(?:option|choice|statement))s?\b"
    r"(?:\s+(?:to|for|of|in)\b[^.:=\n]{0,80}?)?[*_\s)]*"
    r"(?:\b(?:is|are|was|would be|should be|must be|equals)\b\s*[:：]?|[:：=])(?!\s*=)[*_\s]*(?!\s*\n)"
    r"|(?:答案|答)(?:应该|应当|应|就)?\s*(?:是|为|选)?\s*[:：]?\s*(?:(?:是|为|选)[:：]?(?!\W*$))?\s*"
    r"|(?:故|所以|因此|应|正确选项(?:是|为)|正确的是)\s*选?择?\s*[:：]?\s*(?=[(（]?[A-J](?![A-Za-z]))"
)
# A heading "Answer" or "Final answer:" with the answer on a line of its own.
_HEADING = re.compile(
    r"^[^\w\n]*(?:final\s+)?answer[^\w\n]*$|^[^\w\n]*(?:最终)?答案[^\w\n]*$", re.IGNORECASE | re.MULTILINE
)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*?)[ \t]*$", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"'*)]|$)|[。！？\n]")
_ABBREVIATION = re.compile(r"\b(?:[ap]\.m|approx|Mr|Mrs|Dr|vs|Rs|no|in|sq|cu)$", re.IGNORECASE)
_CLAUSE = re.compile(
    r"[,;]?\s*\b(?:because|since|as|which|where|so|for|if|when|while|but|after|that is|i\.e|given|due to|therefore|"
    r"thus|hence|not|instead)\b|，?(?:因为|由于|所以|因此|而不是)"
)
_REASON = re.compile(r"(?<=\w)[,;]?\s*\b(?:because|since|given that|due to)\b|(?<=\w)[，,]?\s*(?:因为|由于)")
_REASONED = re.compile(r"=\s*\$?(\d(?:[\d,.]*\d)?)\W*$")
_DISPLAY = re.compile(r"\s*(\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\$(?:\\.|[^$\\\n])+\$)", re.DOTALL)
_FORMULA_END = re.compile(
    r"(?:\\\((.+?)\\\)|(?<![\\$\d])\$(?![\s$])((?:\\.|[^$\\\n])+?)(?<!\s)\$)[\s.!。*]*$", re.DOTALL
)
_LINKED = re.compile(r"(?:\$|\\\)|\d)\s*(?:,|and|or|和|或|、|,\s*and)\s*$")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z({])|[\u4e00-\u9fff]{2,}")
_FORMULA = re.compile(r"\d|\\[A-Za-z]|[$π√∞]")
# What a tokenizer of another family would have cut off, and GSM8K's marks for a calculator: `48+24=<<48+24=72>>72`.
_MARKS = re.compile(r"</?s>|<\|[\w ]+\|>|<(?:eos|pad|end_of_turn)>|\[/?INST\]")
# Not the arrows among them.
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u2793\u2795-\u279b\u279d-\u27bf\ufe0f\u200d]+")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
# What is said to the reader behind the answer. "If you have 3 apples" is none.
_COURTESY = re.compile(
    r"\W*(?:(?:please |just )?(?:let me know|feel free|(?:don't|do not) hesitate)\b"
    r"|(?:i |we )?hope (?:this|that|it|you|i|my)\b.*"
    r"\b(?:help\w*|clear\w*|useful|understand|correct|right|enjoy|sense|well)\b"
    r"|(?:good luck|happy to help|glad to help|thank you|thanks(?! to)|you're welcome)\b"
    r"|(?:would you like|is there anything|can i help)\b"
    r"|(?:well done|great job|good job|enjoy)\s*[!.,]|(?:have a|keep) (?:great|nice|good|practi|up the)"
    r"|(?:do you have )?any (?:other |more |further )?questions?\b"
    r"|(?:if|do|should) you (?:have|need|want|would|still|are|require)\b.*"
    r"\b(?:questions?|doubts?|(?:more|any|further) (?:help|assistance)|clarification|let me know|feel free|ask)\b"
    r"|希望.*(?:帮助|有用|清楚|理解|明白|满意|喜欢|进步|正确)|如果.*(?:告诉我|问我|提问|随时|帮助)"
    r"|(?:你|您|大家)?还?有(?:任何|其他|其它|什么|更多|不懂|不明白|疑问)|请随时|欢迎(?:随时|提问|继续|你|您)"
    r"|祝(?:你|您|大家|学习)|谢谢|感谢(?:你|您)|加油\W*$|需要(?:任何|其他|更多|我|进一步)|(?:你|您)还\S*吗)",
    re.IGNORECASE | re.DOTALL,
)
# "It's 72!" is no factorial, `72!` and `$n!$` are.
_EXCLAIMED = re.compile(r"(?<=\d)[!！]+$")
_SPOKEN = re.compile(r"[A-Za-z]{2}|[A-Za-z]'[a-z]|[\u4e00-\u9fff]")
# Characters. A longer text is no answer but a solution.
_LONGEST = 600
_TAIL = 3000


class Answer(NamedTuple):
    """A reply's answer as it stands there.

    Attributes:
        text: not normalized.
        kind: "whole" if `text` is the answer and nothing else, "announced" if it begins with it, "prose" if it holds it
            somewhere, most likely at the end.
        boxes: the contents of all boxes, in order.
    """

    text: str
    kind: Kind
    boxes: tuple[str, ...] = ()


def answer_of(reply: str) -> Answer | None:
    r"""The answer of a reply, None where it gives none.

    In this order: the last `<answer></answer>` pair, the last `\boxed{}`, a last line that begins with `####`, what
    "the answer is" announces, the last sentence. What stands within `<think></think>` is not looked at, and of a
    thought that was cut off nothing is, unless the reply ends with an `<answer></answer>` pair all the same.
    """
    found = _answer_of(reply)
    return found if found and len(found.text) <= _LONGEST else None


def _answer_of(reply: str) -> Answer | None:
    text = visible(reply)
    if text is None:
        return None
    final = answer_text(text)
    if final is None and "</answer>" in text:
        # A template may open the pair itself.
        final = _TAGS.split(text[: text.rindex("</answer>")])[-1].strip()
    if final is not None:
        text = final
    elif "<answer>" in text:
        text = text[text.rindex("<answer>") :]
    text = _CALCULATOR.sub("", _MARKS.sub("\n", _EMOJI.sub(" ", _TAGS.sub(" ", text)))).strip()
    if not text:
        return None
    if boxes := _boxes(text):
        return Answer(boxes[-1], "whole", boxes)
    return _within(text, tagged=final is not None)


def visible(reply: str) -> str | None:
    """The reply without its thought; None if it is all thought."""
    if "</think>" in reply:
        reply = reply[reply.rindex("</think>") + len("</think>") :]
    before, cut_off, thought = reply.partition("<think>")
    if not cut_off or before.strip():
        return before
    return thought if thought.rstrip().endswith("</answer>") and answer_text(thought) is not None else None


def _boxes(text: str) -> tuple[str, ...]:
    found, at = [], 0
    while match := _BOX.search(text, at):
        at = match.end()
        if text[at] != "{":
            found.append(re.match(r"[\d.,]*\d", text[at:]).group())
        elif end := closing_brace(text, at):
            found.append(text[at + 1 : end].strip())
            at = end
        else:  # cut off
            found.append(text[at + 1 :].strip())
            break
    return tuple(found)


def closing_brace(text: str, start: int) -> int | None:
    r"""Index of the brace that closes the one at `start`; other brackets, and `\{`, do not count."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    return None


def _within(text: str, *, tagged: bool) -> Answer | None:
    text = _without_courtesy(text[-_TAIL:])
    if (hashes := list(_HASHES.finditer(text))) and (
        not text[hashes[-1].end() :].strip() or not _WORDS.search(normalize(hashes[-1][1][:_LONGEST]))
    ):
        return Answer(hashes[-1][1], "whole")
    plain = strip_markdown(text).strip() if "\n" in text or "*" in text else text
    if announced := _announced(plain):
        return announced
    plain = _without_reason(plain)
    if not re.search(r"[\\$]", plain) and _SPOKEN.search(plain):
        plain = _EXCLAIMED.sub("", plain)
    if not tagged and (formula := _FORMULA_END.search(plain)) and not _LINKED.search(plain[: formula.start()]):
        return Answer(formula[1] or formula[2], "whole")
    if "\n" not in plain and len(plain) <= _LONGEST and len(_WORDS.findall(plain)) <= 3:
        return Answer(plain, "whole")
    if tagged and len(plain) <= _LONGEST:
        return Answer(plain, "prose")
    return _last_sentence(plain)


def _announced(text: str) -> Answer | None:
    starts = [m.end() for m in _ANNOUNCED.finditer(text)] + [m.end() for m in _HEADING.finditer(text)]
    for start in sorted(starts, reverse=True):
        if display := _DISPLAY.match(text, start):
            rest = text[display.end() :]
            unit = re.match(r"[^.,;:!?\n]*", rest).group() if display[1][:2] not in ("$$", r"\[") else ""
            linked = re.match(r"\s*(?:,|and|or|和|或)\s*(?=[\d$\\])", rest)
            if not linked:
                return Answer(display[1] + unit, "announced")
        sentence = first_sentence(text[start:].lstrip())
        sentence = _CLAUSE.split(sentence, maxsplit=1)[0].strip() or sentence.strip()
        if sentence and len(sentence) <= _LONGEST:
            return Answer(sentence, "announced")
    return None


def first_sentence(text: str) -> str:
    for match in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[: match.start()]):
            return text[: match.start()]
    return text


def _sentence_ends(text: str) -> list[int]:
    """Where sentences begin and end: 0, the ends, the length of the text."""
    ends = [0]
    for match in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[max(0, match.start() - 8) : match.start()]):
            ends.append(match.end())
    return [*ends, len(text)]


def _without_courtesy(text: str) -> str:
    """What stands before closing words to the reader, "I hope this helps!"; all of it if it is nothing else."""
    end = len(text)
    for start, stop in reversed(list(pairwise(_sentence_ends(text)))):
        sentence = text[start:stop]
        if re.search(r"\w", sentence):
            if not _COURTESY.match(sentence) or "\\boxed" in sentence:
                break
            end = start
    return text[:end].strip() or text


def _last_sentence(text: str) -> Answer | None:
    """The last sentence with a digit or a formula in it, or else the last one."""
    sentences = [text[a:b].strip() for a, b in pairwise(_sentence_ends(text))]
    sentences = [s for s in sentences if s.strip(".!?。！？ \n")]
    if not sentences:
        return None
    last = next((s for s in reversed(sentences) if _FORMULA.search(s)), sentences[-1])
    return Answer(_without_reason(last)[-_LONGEST:], "prose")


def _without_reason(text: str) -> str:
    """What stands before the last sentence's "because", if that is where the answer is.

    Of "55 more until he has 300, because 300 - 245 = 55" it is what the reason comes to.
    """
    start = text.rfind("\n") + 1
    reason = _REASON.search(text, start)
    if not reason or not _FORMULA.search(text[start : reason.start()]):
        return text
    claim = text[: reason.start()]
    if (result := _REASONED.search(text, reason.end())) and (
        said := re.search(rf"(?<![\d.,]){re.escape(result[1])}(?!\d|[.,]\d)[^\d]*", claim[start:])
    ):
        return claim[: start + said.end()]
    return claim
