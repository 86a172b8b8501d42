"""Named ways to put a task to a model, and a chat template for models that have none."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram_grpo.data.textfile import read_text
from lowvram_grpo.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Template:
    """How the rows of a dataset become prompts of one kind of task.

    Attributes:
        name: what `--template` calls it.
        system_prompt: the system turn.
        few_shot: worked examples, each `{"prompt": str, "completion": str}`; each becomes a user and an assistant turn.
        answer_columns: columns that may hold the reference answer; the first one present becomes `answer`.
        reference_needs: columns without which `reference` has nothing to say.
        reference: a row that has those columns -> the completion that a perfect model would write, or None.
    """

    name: str
    system_prompt: str
    few_shot: tuple[dict[str, str], ...]
    answer_columns: tuple[str, ...]
    reference_needs: tuple[str, ...]
    reference: Callable[[Mapping[str, Any]], str | None]


def _filled(row: Mapping[str, Any], name: str) -> str | None:
    """The stripped text of a field, None where there is none."""
    value = row[name]
    return (value.strip() or None) if isinstance(value, str) else None


def _answer_in_tags(row: Mapping[str, Any]) -> str | None:
    answer = _filled(row, "answer")
    return f"<answer>{answer}</answer>" if answer else None


def _thought_and_answer(row: Mapping[str, Any]) -> str | None:
    reasoning, answer = _filled(row, "reasoning"), _filled(row, "answer")
    if not reasoning or not answer:
        return None
    return f"<think>\n{reasoning}\n</think>\n<answer>\n{answer}\n</answer>"


_SUMMARY_COLUMNS = ("answer", "completion", "summary")

# The example stays near 40 tokens: every prompt of the run pays for it, in the KV cache and in the forward pass.
_TLDR = Template(
    name="tldr",
    system_prompt=(
        "You write TL;DR summaries: one short sentence that says what matters. "
        "Your answer must stand inside <answer></answer>."
    ),
    few_shot=(
        {
            "prompt": "The old bridge closes on Monday for two months of repairs. Drivers should take the tunnel.",
            "completion": "<answer>The old bridge is shut for two months.</answer>",
        },
    ),
    answer_columns=_SUMMARY_COLUMNS,
    reference_needs=("answer",),
    reference=_answer_in_tags,
)

_TLDR_ZH = Template(
    name="tldr-zh",
    system_prompt="你负责写摘要：用一句简短的话说出要点。你的回答必须放在 <answer></answer> 之中。",
    few_shot=(
        {
            "prompt": "老桥将于周一起封闭维修两个月，请司机改走隧道。",
            "completion": "<answer>老桥封闭维修两个月。</answer>",
        },
    ),
    answer_columns=_SUMMARY_COLUMNS,
    reference_needs=("answer",),
    reference=_answer_in_tags,
)

# After the template of DeepSeek-R1-Zero (arXiv:2501.12948, table 1), in our words.
_R1 = Template(
    name="r1",
    system_prompt=(
        "You first think the problem through, then give the final answer. Write the reasoning inside <think></think> "
        "and the answer inside <answer></answer>, and nothing outside of them: "
        "<think>\nreasoning\n</think>\n<answer>\nanswer\n</answer>"
    ),
    few_shot=(),
    answer_columns=("answer", "solution"),
    reference_needs=("answer", "reasoning"),
    reference=_thought_and_answer,
)

TEMPLATES: dict[str, Template] = {template.name: template for template in (_TLDR, _TLDR_ZH, _R1)}

# The generation prompt ends in a newline, not in a space: BPE vocabularies glue a space to the word after it, so a
# prompt that ends in one is a prompt no model has seen.
PLAIN_CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant:\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


def template(name: str) -> Template:
    """The template of that name.

    Raises:
        UserError: there is none; a near name is suggested.
    """
    if name not in TEMPLATES:
        raise UserError(
            f"There is no template {name!r}{did_you_mean(name, TEMPLATES)}; --template takes one of "
            f"{', '.join(TEMPLATES)}."
        )
    return TEMPLATES[name]


def guess(columns: Collection[str]) -> str | None:
    """The template that data with these columns was made for: `completion` is TL;DR's reference, `solution` or
    `answer` that of a question with one right answer."""
    if "completion" in columns:
        return "tldr"
    return "r1" if {"solution", "answer"} & set(columns) else None


def chat_template(name_or_path: str) -> str:
    """Jinja source: `plain` gives `PLAIN_CHAT_TEMPLATE`, a template itself (`is_inline`) stays, anything else is read
    as a file.

    Raises:
        UserError: none of these, or an unreadable or empty file, or one of JSON.
    """
    if name_or_path == "plain":
        return PLAIN_CHAT_TEMPLATE
    if is_inline(name_or_path):
        return name_or_path.removeprefix("\ufeff")
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise UserError(
            f"--chat-template {name_or_path} is neither `plain`{did_you_mean(name_or_path, ['plain'])} nor a .jinja "
            "file that exists, nor the text of a template."
        )
    text = read_text(path, f"--chat-template {name_or_path}")
    if not text.strip():
        raise UserError(f"--chat-template {name_or_path} is an empty file; write a Jinja template into it.")
    if _is_json(text):
        raise UserError(
            f"--chat-template {name_or_path} is a JSON file; pass `plain`, or a .jinja file with the text of its "
            "`chat_template` entry."
        )
    return text


def is_inline(text: str) -> bool:
    """Whether a setting is a chat template itself, as recipes of open-r1 have it, rather than the name of one."""
    return "{{" in text or "{%" in text or "\n" in text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
