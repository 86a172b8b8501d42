r"""Rewards that look at how long a reply is, alone or beside whether it is right: TRL's and Open R1's.

What TRL counts in tokens Open R1 counts in characters or words. Each of these functions takes a `unit`; without one it
is tokens where token ids are given, as a trainer does, and text where only completions are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowvram_grpo.errors import UserError, did_you_mean
from lowvram_grpo.rewards.tags import completion_text
from lowvram_grpo.rewards.verified import judge, references


def len_reward(
    completions: Sequence,
    solution: Sequence | None = None,
    answer: Sequence | None = None,
    prompts: Sequence | None = None,
    **columns: Any,
) -> list[float]:
    """0.5 - (length - shortest) / (longest - shortest), in characters, of a right reply; of a wrong one that or 0,
    whichever is less. 0 where all are as long. A reference that math-verify can't read makes every reply right.

    Kimi k1.5 (arXiv:2501.12599, section 2.3.3). Lengths are compared among the replies to one prompt, as there; without
    `prompts` among all, as in Open R1.

    Raises:
        UserError: the data has neither `solution` nor `answer`.
    """
    verdicts = judge(completions, references("len_reward", solution, answer))
    lengths = [len(completion_text(c)) for c in completions]
    groups: dict[str, list[int]] = {}
    for i in range(len(completions)):
        groups.setdefault("" if prompts is None else repr(prompts[i]), []).append(i)
    rewards = [0.0] * len(completions)
    for members in groups.values():
        shortest, longest = min(lengths[i] for i in members), max(lengths[i] for i in members)
        for i in members if longest > shortest else ():
            saved = 0.5 - (lengths[i] - shortest) / (longest - shortest)
            rewards[i] = min(0.0, saved) if verdicts[i].equal is False else saved
    return rewards


@dataclass(frozen=True)
class _CosineScaled:
    __name__: ClassVar[str] = "cosine_scaled_reward"
    max_len: int
    min_value_wrong: float
    max_value_wrong: float
    min_value_correct: float
    max_value_correct: float
    unit: str | None

    @property
    def full_marks(self) -> float:
        return max(self.min_value_correct, self.max_value_correct)

    def __call__(
        self,
        completions: Sequence,
        solution: Sequence | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        answer: Sequence | None = None,
        **columns: Any,
    ) -> list[float | None]:
        verdicts = judge(completions, references(self.__name__, solution, answer))
        by_tokens = _by_tokens(self.__name__, self.unit, completion_ids)
        lengths = [len(ids) for ids in completion_ids or ()] if by_tokens else None
        if lengths is None:
            lengths = [len(completion_text(c)) for c in completions]
        return [None if v.equal is None else self._scaled(v.equal, length) for v, length in zip(verdicts, lengths)]

    def _scaled(self, right: bool, length: int) -> float:
        # Beyond max_len the cosine would rise again, and with it the reward.
        share = 0.5 * (1.0 + math.cos(math.pi * min(length / self.max_len, 1.0)))
        short, long = (
            (self.max_value_correct, self.min_value_correct) if right else (self.min_value_wrong, self.max_value_wrong)
        )
        return long + (short - long) * share


def get_cosine_scaled_reward(
    max_len: int = 1000,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    unit: str | None = None,
) -> _CosineScaled:
    """Right and short is best, right and long less so; wrong and short is worst (arXiv:2502.03373, appendix C.1).

    With progress p = min(length / max_len, 1) and s = (1 + cos(pi p)) / 2 the reward of a right reply is
    min_value_correct + (max_value_correct - min_value_correct) s, of a wrong one max_value_wrong + (min_value_wrong -
    max_value_wrong) s; None where math-verify can't read the reference.

    Args:
        unit: of lengths, "tokens" or "characters"; None: tokens where `completion_ids` are given, else characters.

    Raises:
        ValueError: max_len is not above 0, or an unknown unit.
    """
    if max_len <= 0:
        raise ValueError(f"max_len {max_len} should be above 0")
    _check_unit(unit, "characters")
    return _CosineScaled(max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct, unit)


@dataclass(frozen=True)
class _RepetitionPenalty:
    __name__: ClassVar[str] = "repetition_penalty_reward"
    full_marks: ClassVar[float] = 0.0
    ngram_size: int
    max_penalty: float
    language: str
    unit: str | None

    def __call__(
        self, completions: Sequence | None = None, completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
    ) -> list[float]:
        if completion_ids is None and _are_ids(completions):
            completion_ids = completions
        if _by_tokens(self.__name__, self.unit, completion_ids):
            return [self._penalty(list(ids)) for ids in completion_ids or ()]
        return [self._penalty(self._words(completion_text(c))) for c in completions or ()]

    def _words(self, text: str) -> list:
        if self.language == "en":
            return text.lower().split()
        import jieba

        return list(jieba.cut(text))

    def _penalty(self, units: list) -> float:
        ngrams = list(zip(*(units[i:] for i in range(self.ngram_size))))
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        return repeated * self.max_penalty if repeated else 0.0


def get_repetition_penalty_reward(
    ngram_size: int = 3, max_penalty: float = -1.0, language: str = "en", unit: str | None = None
) -> _RepetitionPenalty:
    """max_penalty times the share of n-grams that are repetitions, (1 - distinct / all): 0 to max_penalty, 0 for what
    is shorter than an n-gram (arXiv:2502.03373, appendix C.2).

    Args:
        language: how text is cut into words: "en" at white space, in lower case; "zh" by jieba.
        unit: "tokens" or "words"; None: tokens where `completion_ids` are given, else words.

    Raises:
        ValueError: max_penalty above 0, ngram_size below 1, an unknown unit or language, or jieba is not installed.
    """
    if max_penalty > 0:
        raise ValueError(f"max_penalty {max_penalty} should not be positive")
    if ngram_size < 1:
        raise ValueError(f"ngram_size {ngram_size} should be at least 1")
    if language not in ("en", "zh"):
        raise ValueError(f"language {language!r} is not known; take 'en' (words between white space) or 'zh' (jieba)")
    if language == "zh":
        try:
            import jieba  # noqa: F401
        except ImportError as error:
            raise ValueError("language 'zh' takes jieba to find words; `pip install jieba`") from error
    _check_unit(unit, "words")
    return _RepetitionPenalty(ngram_size, max_penalty, language, unit)


@dataclass(frozen=True)
class _SoftOverlong:
    __name__: ClassVar[str] = "soft_overlong_punishment_reward"
    full_marks: ClassVar[float] = 0.0
    max_completion_len: int | None
    soft_punish_cache: int | None

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        if self.max_completion_len is None or self.soft_punish_cache is None:
            raise UserError(
                "the reward 'soft_overlong_punishment' needs max_completion_len and soft_punish_cache; give "
                "get_soft_overlong_punishment(max_completion_len, soft_punish_cache) in its place."
            )
        return [self._punishment(len(ids), self.max_completion_len, self.soft_punish_cache) for ids in completion_ids]

    @staticmethod
    def _punishment(length: int, longest: int, cache: int) -> float:
        if length > longest:
            return -1.0
        over = length - (longest - cache)
        return -over / cache if over > 0 else 0.0


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> _SoftOverlong:
    """0 up to max_completion_len - soft_punish_cache tokens, from there down to -1 at max_completion_len, and -1 beyond
    (DAPO, arXiv:2503.14476, equation 13)."""
    return _SoftOverlong(max_completion_len, soft_punish_cache)


# The built-in: a recipe knows its lengths, a bare name does not.
UNSIZED_PUNISHMENT = _SoftOverlong(None, None)


def _are_ids(completions: Sequence | None) -> bool:
    first = next((c for c in completions or () if len(c)), None)
    return first is not None and not isinstance(first, str) and isinstance(first[0], int)


def _by_tokens(name: str, unit: str | None, completion_ids: Sequence | None) -> bool:
    if unit == "tokens" and completion_ids is None:
        raise UserError(f"the reward {name!r} counts tokens, but no completion_ids are given.")
    return unit == "tokens" or (unit is None and completion_ids is not None)


def _check_unit(unit: str | None, of_text: str) -> None:
    if unit not in (None, "tokens", of_text):
        raise ValueError(f"unit {unit!r} should be 'tokens' or {of_text!r}{did_you_mean(unit, ['tokens', of_text])}")
