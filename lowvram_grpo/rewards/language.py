"""Reward for staying in the language of the prompt, told apart by script.

After DeepSeek-R1 (arXiv:2501.12948, section 2.3.2), which takes the share of words in the target language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from lowvram_grpo.rewards.tags import completion_text

# Tags, formulas and code are Latin letters in every language.
_NEUTRAL = re.compile(r"```.*?```|\$[^$]*\$|</?\w+>|\\[A-Za-z]+", re.DOTALL)
_KANA = {"HIRAGANA", "KATAKANA"}


def language_consistency(prompts: Sequence, completions: Sequence, **columns: Any) -> list[float | None]:
    """Share of the reply's letters, 0 to 1, that belong to the script of the prompt's main language.

    Of a conversational prompt the last user turn counts. Han characters belong to a Japanese prompt as kana do. None
    where the prompt or the reply has no letter (`17 + 25 =`).
    """
    return [_share(_question(p), completion_text(c)) for p, c in zip(prompts, completions)]


def _question(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    users = [message for message in prompt if message.get("role") == "user"]
    return completion_text(users[-1:] or prompt)


def _share(prompt: str, reply: str) -> float | None:
    wanted = _main_scripts(prompt)
    scripts = [_script(ch) for ch in _NEUTRAL.sub(" ", reply) if ch.isalpha()]
    if not wanted or not scripts:
        return None
    return sum(script in wanted for script in scripts) / len(scripts)


def _main_scripts(prompt: str) -> set[str]:
    """Scripts of the language that most words of the prompt are in; a Han or kana character counts as a word."""
    words: Counter[str] = Counter()
    previous = None
    for ch in _NEUTRAL.sub(" ", prompt):
        script = _script(ch) if ch.isalpha() else None
        if script and (script != previous or script in _KANA or script == "CJK"):
            words[script] += 1
        previous = script
    if not words:
        return set()
    if kana := sum(words[script] for script in _KANA):
        words["HIRAGANA"] = kana + words.pop("CJK", 0)
        words.pop("KATAKANA", None)
    main = words.most_common(1)[0][0]
    return {"CJK", *_KANA} if main in _KANA else {main}


@lru_cache(maxsize=4096)
def _script(ch: str) -> str:
    """Script of a letter: the first word of its Unicode name (LATIN, CJK, CYRILLIC, HANGUL, ...)."""
    return unicodedata.name(ch, "UNKNOWN").split()[0]
