"""Numbers as people write them, read exactly: `1234.50`, `2 1/2`, `1.6e-19`, `101_2`, `3:4`, `2:30 pm`, `July 4`."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

# Larger exponents would take longer to write out than to compare otherwise.
_MAX_EXPONENT = 4000

_UNSIGNED = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([+-]?)\s*({_UNSIGNED})")
_FRACTION = re.compile(
    rf"([+-]?)\s*(?:(\d+)\s*(?:\s|\+|(?=\\))\s*)?"
    rf"(?:\\frac\s*\{{\s*([+-]?{_UNSIGNED})\s*\}}\s*\{{\s*([+-]?{_UNSIGNED})\s*\}}|(\d+)\s*/\s*(\d+))"
)
_DIVISION = re.compile(rf"([+-]?)\s*({_UNSIGNED})\s*/\s*({_UNSIGNED})")
_SCIENTIFIC = re.compile(rf"([+-]?)\s*(?:({_UNSIGNED})\s*(?:\\times|\\cdot|\*)\s*)?10\s*\^\s*\{{?\s*([+-]?\d+)\s*\}}?")
_REPEATING = re.compile(r"([+-]?)\s*(\d*)\.(\d*)(?:\\overline\s*\{\s*(\d+)\s*\}|\((\d+)\)|\\dot\s*\{?\s*(\d)\s*\}?)")

_BASE_NAMES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_BASE_WORDS = {name: base for base, name in enumerate(_BASE_NAMES.split(), 2)}
_BASE = re.compile(
    r"(?:\(\s*([0-9A-Za-z]+)\s*\)|([0-9A-F]+|[0-9a-f]+))\s*"
    r"_\s*\{?\s*(?:\(\s*)?(\d+|[a-z]+)(?:\s*\))?\s*\}?"
)
_RATIO = re.compile(rf"{_UNSIGNED}(?:\s*:\s*{_UNSIGNED})+")
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?\s*(?:([ap])\.?\s?m\b\.?|o'clock)?", re.IGNORECASE)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = rf"({'|'.join(_MONTHS)})[a-z]*\.?"
_DATES = (
    (re.compile(rf"(?:[a-z]+day,? )?{_MONTH} (\d{{1,2}})(?:st|nd|rd|th)?(?:,? (\d{{4}}))?"), "mdy"),
    (re.compile(rf"(?:[a-z]+day,? )?(?:the )?(\d{{1,2}})(?:st|nd|rd|th)? (?:of )?{_MONTH},?(?: (\d{{4}}))?"), "dmy"),
    (re.compile(r"(\d{4})-(\d{2})-(\d{2})"), "ymd"),
    (re.compile(r"(?:(\d{4}) ?年 ?)?(\d{1,2}) ?月 ?(\d{1,2}) ?[日号]"), "ymd"),
)


class Number(NamedTuple):
    """An exact value, and whether it was written with a decimal point, hence maybe rounded."""

    value: Fraction
    decimal: bool


@lru_cache(maxsize=4096)
def number(text: str) -> Number | None:
    """The number that `text` (normalized) is as a whole, None where it is anything else."""
    text = text.strip()
    if not text or len(text) > 200:
        return None
    if match := _PLAIN.fullmatch(text):
        return _signed(match[1], Fraction(match[2]), "." in match[2])
    if match := _FRACTION.fullmatch(text):
        sign, whole, top, bottom, a, b = match.groups()
        return _ratio(sign, whole, top or a, bottom or b)
    if match := _DIVISION.fullmatch(text):
        return _ratio(match[1], None, match[2], match[3])
    if match := _SCIENTIFIC.fullmatch(text):
        sign, mantissa, exponent = match.groups()
        if abs(int(exponent)) > _MAX_EXPONENT:
            return None
        return _signed(sign, Fraction(mantissa or 1) * Fraction(10) ** int(exponent), "." in (mantissa or ""))
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, *cycles = match.groups()
        cycle = next(c for c in cycles if c)
        digits = Fraction(int(fixed + cycle) - int(fixed or 0), 10 ** len(fixed) * (10 ** len(cycle) - 1))
        return _signed(sign, int(whole or 0) + digits, False)
    return None


def _signed(sign: str | None, value: Fraction, decimal: bool) -> Number:
    return Number(-value if sign == "-" else value, decimal)


def _ratio(sign: str | None, whole: str | None, top: str, bottom: str) -> Number | None:
    below = Fraction(bottom)
    if below == 0:
        return None
    return _signed(sign, int(whole or 0) + Fraction(top) / below, "." in top + bottom)


def same_number(first: Number, second: Number) -> bool:
    """Exactly equal; of numbers with a decimal point, up to rounding at six decimals and five significant digits.

    Math-verify's six decimals alone make all numbers below 1e-6 equal.
    """
    difference = abs(first.value - second.value)
    if difference == 0:
        return True
    if not (first.decimal or second.decimal):
        return False
    largest = max(abs(first.value), abs(second.value))
    return difference <= Fraction(5, 10**7) and difference * 10**5 <= largest


@lru_cache(maxsize=4096)
def based(text: str) -> tuple[str, int] | None:
    """Digits and base of `101_2` or `(101)_{two}`."""
    match = _BASE.fullmatch(text.strip())
    if not match:
        return None
    digits, name = (match[1] or match[2]).upper(), match[3]
    base = int(name) if name.isdigit() else _BASE_WORDS.get(name, 0)
    if not 2 <= base <= 36 or not all(int(digit, 36) < base for digit in digits):
        return None
    return digits.lstrip("0") or "0", base


def same_based(gold: str, reply: str) -> bool | None:
    """Whether digits and base agree; a base the reply leaves out is the reference's. None: neither has a base."""
    wanted, found = based(gold), based(reply)
    if wanted is None and found is None:
        return None
    if wanted is None:
        return found[1] == 10 and found[0] == gold.strip()
    if found is None:
        return reply.strip().upper().lstrip("0") == wanted[0]
    return wanted == found


def same_ratio(gold: str, reply: str) -> bool | None:
    """Whether two ratios are proportional, `2:4` and `1:2`; `1/2` is one, too. None: the reference is no ratio.

    What may be two times of day (`2:30`, `1:15`) has to agree part by part.
    """
    wanted, found = _ratio_parts(gold), _ratio_parts(reply)
    if wanted is None:
        return None
    if found is None:
        fraction = number(reply)
        return fraction is not None and len(wanted) == 2 and wanted[1] != 0 and wanted[0] / wanted[1] == fraction.value
    if len(wanted) != len(found):
        return False
    if _CLOCK.fullmatch(gold.strip()) and _CLOCK.fullmatch(reply.strip()):
        return wanted == found
    return all(a * found[0] == b * wanted[0] for a, b in zip(wanted, found)) and any(found) and any(wanted)


def _ratio_parts(text: str) -> list[Fraction] | None:
    text = text.strip()
    return [Fraction(part.strip()) for part in text.split(":")] if _RATIO.fullmatch(text) else None


@lru_cache(maxsize=1024)
def clock(text: str) -> tuple[int, bool] | None:
    """Seconds since midnight of `3:30 PM`, and whether it said AM or PM; None for what shows no time of day."""
    match = _CLOCK.fullmatch(text.strip())
    if not match or not (match[2] or match[4] or "clock" in text):
        return None
    hour, half = int(match[1]), (match[4] or "").lower()
    if hour > 24 or (half and not 1 <= hour <= 12):
        return None
    hour = hour % 12 + 12 * (half == "p") if half else hour
    return hour * 3600 + int(match[2] or 0) * 60 + int(match[3] or 0), bool(half) or hour > 12


def same_clock(gold: str, reply: str) -> bool | None:
    """Whether two times of day agree; without AM or PM on one side, on the dial. None: one of them is no such time."""
    wanted, found = clock(gold), clock(reply)
    if wanted is None or found is None or not (wanted[1] or found[1]):
        return None
    if wanted[1] and found[1]:
        return wanted[0] == found[0]
    return wanted[0] % 43200 == found[0] % 43200


@lru_cache(maxsize=1024)
def date(text: str) -> tuple[int | None, int, int] | None:
    """(year or None, month, day) of `July 4, 1776`, `4 July 1776`, `1776-07-04` or `1776年7月4日`."""
    text = text.strip().lower()
    for pattern, order in _DATES:
        if match := pattern.fullmatch(text):
            part = dict(zip(order, match.groups()))
            month = _MONTHS.index(part["m"]) + 1 if part["m"] in _MONTHS else int(part["m"])
            return int(part["y"]) if part["y"] else None, month, int(part["d"])
    return None


def same_date(gold: str, reply: str) -> bool | None:
    """Whether two dates agree in all that both say. None: the reference is no date, or neither is."""
    wanted, found = date(gold), date(reply)
    if wanted is None or found is None:
        return None
    return wanted[1:] == found[1:] and (wanted[0] == found[0] or None in (wanted[0], found[0]))


def moments(text: str) -> list[str]:
    """The dates and times of day within a text, in order."""
    found = [m.group() for pattern, _ in _DATES for m in pattern.finditer(text.lower())]
    return found + [m.group() for m in _CLOCK.finditer(text) if clock(m.group())]
