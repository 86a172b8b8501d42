"""Rewards for the form of a reply that TRL and Open R1 give, to the same numbers.

Stricter or looser than tags.py, whose `format` takes any white space between tags and nothing behind them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowvram_grpo.rewards.tags import completion_text

# `$` ends a line, so that something may follow on the next one, as in Open R1.
_FLAGS = re.DOTALL | re.MULTILINE
_SECTIONS = r"<think>\n.*?\n</think>\n<answer>\n{}\n</answer>$"
_FORMAT = re.compile(_SECTIONS.format(".*?"), _FLAGS)
_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
# The number of a list counts at the very beginning alone: Open R1's pattern has `^` without multi-line matching.
_STEP = re.compile(r"Step \d+:|\A\d+\.|\n[-*]|(?:First|Second|Next|Finally),")
_ENOUGH_STEPS = 3


def format_reward(completions: Sequence, **columns: Any) -> list[float]:
    """1 where the reply begins with `<think>`, `</think>`, `<answer>` and `</answer>`, in this order and each on a line
    of its own; else 0. Open R1's."""
    return [1.0 if _FORMAT.match(completion_text(c)) else 0.0 for c in completions]


def think_format_reward(completions: Sequence, **columns: Any) -> list[float]:
    """1 where the reply begins with `<think>`, has no second one, and closes it; else 0. TRL's."""
    return [_thinks(completion_text(c)) for c in completions]


def _thinks(reply: str) -> float:
    thought = reply.removeprefix("<think>")
    return 1.0 if thought != reply and "<think>" not in thought and "</think>" in thought else 0.0


def tag_count_reward(completions: Sequence, **columns: Any) -> list[float]:
    """A quarter for each of the four tags of `format_reward` that stands in the reply exactly once, with its line
    breaks. Open R1's."""
    texts = map(completion_text, completions)
    return [sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS) for text in texts]


def reasoning_steps_reward(completions: Sequence, **columns: Any) -> list[float]:
    """A third for each sign of a step (`Step 1:`, a bullet on a new line, `First,`, `Second,`, `Next,`, `Finally,`), at
    most 1. Open R1's."""
    return [min(1.0, len(_STEP.findall(completion_text(c))) / _ENOUGH_STEPS) for c in completions]


@dataclass(frozen=True)
class _CodeFormat:
    __name__: ClassVar[str] = "code_format_reward"
    language: str

    def __call__(self, completions: Sequence, language: Sequence[str] | None = None, **columns: Any) -> list[float]:
        languages = language if language is not None else [self.language] * len(completions)
        patterns = [_SECTIONS.format(rf".*?```{re.escape(name)}.*?```.*?") for name in languages]
        pairs = zip(patterns, map(completion_text, completions))
        return [1.0 if re.match(pattern, text, _FLAGS) else 0.0 for pattern, text in pairs]


def get_code_format_reward(language: str = "python") -> _CodeFormat:
    """`format_reward` for programs: 1 where the answer also holds a block of code in `language`, or in what the data's
    column of that name says. Open R1's."""
    return _CodeFormat(language)
