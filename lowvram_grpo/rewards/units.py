"""Units behind and before a number: which ones are the same, and how one turns into another."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from lowvram_grpo.rewards.notation import DOLLAR

_TABLE = {
    "length": {
        "1/1000": "mm millimeter millimetre 毫米", "1/100": "cm centimeter centimetre 厘米",
        "1/10": "dm decimeter 分米",
        "1": "m meter metre 米", "1000": "km kilometer kilometre 千米 公里",
        "0.0254": "inch inches in 英寸",
        "0.3048": "ft foot feet 英尺", "0.9144": "yd yard 码", "1609.344": "mi mile 英里",
    },
    "mass": {
        "1/1000": "mg milligram 毫克", "1": "g gram 克", "1000": "kg kilogram kilo 千克 公斤", "500": "斤",
        "1000000": "tonne 吨", "453.59237": "lb pound lbs", "28.349523125": "oz ounce",
    },
    "time": {
        "1/1000": "ms millisecond 毫秒", "1": "s sec second 秒 秒钟", "60": "min minute 分钟",
        "3600": "h hr hour 小时 个小时", "86400": "day 天", "604800": "week 周 星期",
    },
    "months": {"1": "month 个月", "12": "year yr 年"},
    "volume": {
        "1/1000": "ml mL milliliter millilitre 毫升", "1": "l L liter litre 升",
    },
    "gallons": {"1": "cup", "2": "pint", "4": "quart qt", "16": "gallon gal"},
    "dollars": {"1/100": "cent ¢ 美分", "1": f"{DOLLAR} dollar usd buck 美元"},
    "euros": {"1": "€ euro eur 欧元"}, "pounds": {"1": "£ gbp 英镑", "1/100": "pence penny"},
    "yuan": {"1": "¥ yuan rmb cny yen jpy 元 块 块钱 人民币"},
    "rupees": {"1": "₹ rs rupee inr 卢比"},
    "angle": {"1": r"^\circ degree deg 度"}, "radians": {"1": "radian rad 弧度"},
    "percent": {"1": "%"},
    "celsius": {"1": r"^\circC celsius 摄氏度"}, "fahrenheit": {"1": r"^\circF fahrenheit"},
    "kelvin": {"1": "K kelvin"},
    "speed": {"1609.344/3600": "mph", "1000/3600": "kph kmh kmph"},
    "volt": {"1": "V volt"}, "watt": {"1": "W watt", "1000": "kW kilowatt"}, "newton": {"1": "N newton"},
    "joule": {"1": "J joule", "1000": "kJ kilojoule"}, "hertz": {"1": "Hz hertz"}, "ampere": {"1": "A ampere amp"},
    "ohm": {"1": "ohm"}, "unit": {"1": "unit 单位"},
    "mole": {"1": "mol mole"}, "pascal": {"1": "Pa pascal", "1000": "kPa"},
    "area": {"10000": "hectare ha 公顷", "4046.8564224": "acre",
             "1": "平方米", "1/10000": "平方厘米", "1000000": "平方千米 平方公里"},
}  # fmt: skip
_MONEY = frozenset(("dollars", "euros", "pounds", "yuan", "rupees"))
_POWER_NAMES = {("length", 2): "area", ("length", 3): "volume"}
# What a number is scaled by, where it stands before the unit: `2 million dollars`.
SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "亿": 10**8,
}  # fmt: skip
# Letters that are a unit only behind a space: `5m` may be five times m.
_LETTERS = frozenset("mghslLKVWNJA")
_QUANTIFIED = re.compile(r"(square|sq\.?|cubic|cu\.?)\s+")
_TOKEN = re.compile(rf"\^\\circ\s*[CF]?(?![A-Za-z])|[{DOLLAR}€£¥₹%¢]|[A-Za-z]+(?:'s)?|[\u4e00-\u9fff]+|/|\^\{{?\d\}}?")


class Unit(NamedTuple):
    """One unit: (dimension, power) pairs, sorted, and how many of the dimension's own units it holds."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


def _fraction(text: str) -> Fraction:
    top, _, bottom = text.partition("/")
    return Fraction(top) / Fraction(bottom or 1)


_UNITS = {
    name: Unit(((dimension, 1),), _fraction(factor))
    for dimension, members in _TABLE.items()
    for factor, names in members.items()
    for name in names.split()
}


@lru_cache(maxsize=4096)
def unit_of(word: str) -> Unit | None:
    """The unit called `word`, in singular or plural, None for any other word."""
    word = word.strip(".").replace(" ", "")
    for name in (word, word.lower(), word.lower().removesuffix("s"), word.lower().removesuffix("es")):
        if name in _UNITS and (len(name) > 1 or name == word or not word.isalpha()):
            return _UNITS[name]
    return None


@lru_cache(maxsize=4096)
def units_in(words: str, attached: bool = False) -> tuple[Unit | None, tuple[str, ...]]:
    """The unit that `words` begin with, and the words that are left.

    Args:
        words: what stands behind a number: `km per hour on foot`, `cm^{2}`, `square feet`, `%`.
        attached: without a space between; then a single letter is no unit.
    """
    power, rest = 1, words.strip()
    if match := _QUANTIFIED.match(rest):
        power, rest = (2 if match[1].startswith("s") else 3), rest[match.end() :]
    tokens = _TOKEN.findall(rest)
    if tokens[:1] == ["in"] and len(tokens) > 1 and tokens[1][0] != "^":  # `5 (in dollars)`
        del tokens[0]
    if not tokens or (attached and tokens[0] in _LETTERS):
        return None, tuple(tokens)
    unit = unit_of(tokens[0])
    if unit is None:
        return _chinese(tokens)
    del tokens[0]
    if tokens and tokens[0].startswith("^") and tokens[0].strip("^{}").isdigit():
        power = int(tokens.pop(0).strip("^{}"))
    unit = _power(unit, power)
    # `$18 dollars` says it twice.
    while tokens and unit_of(tokens[0]) == unit:
        del tokens[0]
    if len(tokens) > 1 and tokens[0] in ("/", "per", "a", "an", "each", "every") and (below := unit_of(tokens[1])):
        unit, tokens = _over(unit, below), tokens[2:]
        if tokens and tokens[0].startswith("^") and tokens[0].strip("^{}").isdigit():
            for _ in range(int(tokens.pop(0).strip("^{}")) - 1):
                unit = _over(unit, below)
    return unit, tuple(tokens)


def _chinese(tokens: list[str]) -> tuple[Unit | None, tuple[str, ...]]:
    """A unit at the head of a run of characters, which has no spaces: `米高`."""
    head = tokens[0]
    for end in range(min(4, len(head)), 0, -1):
        if not head[0].isascii() and (unit := unit_of(head[:end])):
            return unit, tuple(t for t in (head[end:], *tokens[1:]) if t)
    return None, tuple(tokens)


def _power(unit: Unit, power: int) -> Unit:
    if power == 1:
        return unit
    (dimension, _), *_ = unit.dimensions
    factor = unit.factor**power
    if (dimension, power) in _POWER_NAMES:
        # A litre is a thousandth of a cubic metre.
        return Unit(((_POWER_NAMES[dimension, power], 1),), factor * (1000 if power == 3 else 1))
    return Unit(((dimension, power),), factor)


def _over(unit: Unit, below: Unit) -> Unit:
    if {unit.dimensions, below.dimensions} == {(("length", 1),), (("time", 1),)} and unit.dimensions[0][0] == "length":
        return Unit((("speed", 1),), unit.factor / below.factor)
    powers = dict(unit.dimensions)
    for name, power in below.dimensions:
        powers[name] = powers.get(name, 0) - power
    return Unit(tuple(sorted(powers.items())), unit.factor / below.factor)


def same_money(first: Unit, second: Unit) -> bool:
    """Whether both are the same money, once as a rate: `18 dollars a day` is `18 dollars`."""
    kinds = [{name for name, power in unit.dimensions if power > 0} for unit in (first, second)]
    rates = [any(power < 0 for _, power in unit.dimensions) for unit in (first, second)]
    return kinds[0] == kinds[1] <= _MONEY and rates[0] != rates[1]
