"""Rewards for the form of a reply: is the answer inside `<answer></answer>`, and only there?

All have TRL's signature `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, with one value per
completion; None means that the reward does not apply to that row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# The inner text may hold no further tag: in `<answer><answer>x</answer>` the pair is the one around `x`.
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_INNER = r"(?:(?!</?(?:think|answer)>).)*"
_OPENED_ANSWER = re.compile(rf"{_INNER}</think>\s*<answer>{_INNER}</answer>", re.DOTALL)


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """A completion as text: itself, or what its messages say, one after another; not what tools answered, for which
    the model earns nothing.

    A message's content is a string or a list of blocks, of which those with a `text` count.
    """
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role") != "tool"]
    return "\n".join(_content_text(message.get("content")) for message in said)


def _content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.get("text") or "" for block in content)


def answer_text(text: str) -> str | None:
    """The stripped text of the last `<answer></answer>` pair (a reply's final word), None without a pair."""
    pairs = _ANSWER.findall(text)
    return pairs[-1].strip() if pairs else None


def label(completions: Sequence, **columns: Any) -> list[float]:
    """5 where the reply holds an `<answer></answer>` pair, else 0."""
    return [5.0 if _ANSWER.search(completion_text(c)) else 0.0 for c in completions]


def label_strict(completions: Sequence, **columns: Any) -> list[float]:
    """10 where the reply, stripped, is one `<answer></answer>` pair and nothing else, else 0."""
    return [10.0 if _ANSWER.fullmatch(completion_text(c).strip()) else 0.0 for c in completions]


def content(completions: Sequence, answer: Sequence[str | None], **columns: Any) -> list[float | None]:
    """5 where the reply's answer is not empty and has fewer characters than the reference, `answer`; else 0."""
    return [None if ref is None else _content(completion_text(c), str(ref)) for c, ref in zip(completions, answer)]


def _content(reply: str, reference: str) -> float:
    found = answer_text(reply)
    return 5.0 if found and len(found) < len(reference.strip()) else 0.0


def format(completions: Sequence, prompts: Sequence | None = None, **columns: Any) -> list[float]:
    """1 where the reply, stripped, is `<think>...</think>`, then `<answer>...</answer>` and nothing else, else 0.

    The first `<think>` may be missing where the prompt may have ended with it, as templates of reasoning models do: of
    a conversation that is not known here; a prompt that is a string has to end so.
    """
    if prompts is None:
        prompts = [None] * len(completions)
    return [_format(completion_text(c).strip(), _may_open(p)) for c, p in zip(completions, prompts)]


def _format(reply: str, opened: bool) -> float:
    thought = reply.removeprefix("<think>")
    return 1.0 if (opened or thought != reply) and _OPENED_ANSWER.fullmatch(thought) else 0.0


def _may_open(prompt: Any) -> bool:
    return not isinstance(prompt, str) or prompt.rstrip().endswith("<think>")
