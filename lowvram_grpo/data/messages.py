"""The forms in which data holds a conversation, and the one that everything here reads: `{role, content}` of text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Who speaks in ShareGPT's form, `{"from": "human", "value": ...}`.
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
_TEXT_PARTS = (None, "text", "input_text")


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a list of messages (`{"role": str, "content": str}`) rather than plain text."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict) and "role" in prompt[0]


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, `{role, content}` or ShareGPT's `{from, value}`."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return False
    return all("role" in message for message in value) or all({"from", "value"} <= message.keys() for message in value)


def written_out(text: str) -> bool:
    """Whether a text looks like a list of messages, as JSON or as Python shows one."""
    return _WRITTEN_OUT.match(text) is not None and text.rstrip().endswith("]")


def decoded(text: str) -> list[dict[str, Any]]:
    """The messages that a text `written_out` holds.

    Raises:
        ValueError: it holds none.
    """
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if is_messages(found):
            return found
    raise ValueError("looks like a list of messages, but is neither JSON nor Python")


def as_messages(value: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages of either form as `{role, content}`, their text parts joined; other keys go.

    Raises:
        ValueError: a message holds something else than text; the message completes `Row 3 ...`.
    """
    return [_message(message) for message in value]


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    if "role" in message:
        role, content = message["role"], message.get("content")
    else:
        role, content = _SPEAKERS.get(str(message["from"]).lower()), message["value"]
        if role is None:
            raise ValueError(
                f"has a message from {message['from']!r}, which is none of {', '.join(sorted({*_SPEAKERS}))}"
            )
    content = joined(content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError("has a message whose role or content is not text; only text messages are supported")
    return {"role": role, "content": content}


def joined(content: Any) -> Any:
    """The text of a content that comes in parts (`[{"type": "text", "text": ...}]`); any other content as it is.

    Raises:
        ValueError: a part is not text.
    """
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, (list, tuple)):
        return content
    return "".join(map(_part, parts))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise ValueError(f"has a message with a part of type {kind!r}; only text is supported, no images or sound")
    return part["text"]


def in_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with text parts joined; raises as `joined`. Other keys than the content stay."""
    return [
        {**message, "content": joined(message["content"])} if "content" in message else message for message in messages
    ]
