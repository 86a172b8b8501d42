"""Named ways to ask: a system prompt, a worked turn, and the form in which a reference answers.

A template turns a row into a conversation and, where the row has a reference answer, into the completion that the rewards
would like best; the cold start learns from those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram_grpo.errors import UserError, did_you_mean

# For base models: no special tokens but the end of a turn, so that any tokenizer carries it.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% else %}Assistant: {{ message['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Template:
    """`few_shot` are (user, assistant) turns shown before the question; `reference` formats a row's answer, or None."""

    name: str
    system_prompt: str
    few_shot: tuple[tuple[str, str], ...]
    answer_columns: tuple[str, ...]
    reference: Callable[[Mapping[str, Any]], str | None]


def _tagged(row: Mapping[str, Any]) -> str | None:
    return f"<answer>{row['answer'].strip()}</answer>" if row.get("answer") else None


def _reasoned(row: Mapping[str, Any]) -> str | None:
    """Only where the data has the reasoning: an empty <think> would teach the model not to think."""
    if not (row.get("answer") and row.get("reasoning")):
        return None
    return f"<think>\n{row['reasoning'].strip()}\n</think>\n<answer>\n{row['answer'].strip()}\n</answer>"


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            "tldr",
            "You write TL;DR summaries: one short sentence with the point of a text. "
            "Your answer must stand inside <answer></answer>.",
            (
                (
                    "The council voted on Monday to close the old bridge for repairs; it will stay shut until spring.",
                    "<answer>The old bridge is closed for repairs until spring.</answer>",
                ),
            ),
            ("completion", "answer", "summary"),
            _tagged,
        ),
        Template(
            "tldr-zh",
            "你负责为文章写一句简短的摘要。你的回答必须写在 <answer></answer> 之内。",
            (
                (
                    "市议会周一投票决定关闭旧桥进行维修，直到明年春天才重新开放。",
                    "<answer>旧桥关闭维修，明春重新开放。</answer>",
                ),
            ),
            ("completion", "answer", "summary"),
            _tagged,
        ),
        Template(
            "r1",
            "Think first, then answer. Write your reasoning inside <think></think> and after it only the final answer "
            "inside <answer></answer>.",
            (),
            ("answer", "solution", "completion"),
            _reasoned,
        ),
    )
}


def find(name: str) -> Template:
    """The template called `name`.

    Raises:
        UserError: there is none; lists those there are.
    """
    if name not in TEMPLATES:
        raise UserError(
            f"There is no template {name!r}{did_you_mean(name, TEMPLATES)}; templates: {', '.join(TEMPLATES)}."
        )
    return TEMPLATES[name]


def chat_template(name_or_path: str) -> str:
    """Jinja source of a chat template: `plain`, or the contents of a .jinja file.

    Raises:
        UserError: neither.
    """
    if name_or_path == "plain":
        return PLAIN_CHAT_TEMPLATE
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(f"--chat-template {name_or_path!r} is neither `plain` nor a .jinja file that exists.")
    return path.read_text(encoding="utf-8")
