"""Tools in a conversation: how a model is told of them, what it wrote where it calls one, and how an answer is rendered
behind what it wrote without touching a token of that.

A model calls tools in the form that its chat template shows: `<tool_call>{json}</tool_call>` (Hermes, Qwen, MiniMind,
SmolLM3), `[TOOL_CALLS] [{json}]` (Mistral), a JSON object with `name` and `parameters` (Llama 3), or whatever the
tokenizer's own `response_schema` says (transformers >= 5). A turn that is nothing but the JSON of a call of a tool that
there is counts everywhere: small models leave the tags out. All else is text.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.rendering import rendered
from lowvram_grpo.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])\s*\Z", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)
_PROBE = "an answer 7431"


def schemas_of(tools: Sequence[Callable]) -> list[dict[str, Any]]:
    """What the chat template is told of each tool, from its name, type hints and docstring.

    Raises:
        UserError: one has no such.
    """
    from transformers.utils import get_json_schema

    found = []
    for tool in tools:
        try:
            found.append(get_json_schema(tool))
        except Exception as error:  # DocstringParsingException, TypeHintParsingException, and others of signatures
            raise UserError(
                f"The tool {name_of(tool)!r} can't be described to the model ({one_line(error)}); give it type hints "
                "and a docstring with an `Args:` section that has a line for each argument."
            ) from error
    return found


def name_of(tool: Callable) -> str:
    return getattr(tool, "__name__", type(tool).__name__)


def check_template(tokenizer: PreTrainedTokenizerBase, schemas: list[dict[str, Any]], kwargs: dict[str, Any]) -> None:
    """Whether the chat template tells a model of tools and shows it their answers.

    Raises:
        UserError: it does not.
    """
    chat = [{"role": "user", "content": "Hello."}]
    told = rendered(tokenizer, chat, {**kwargs, "tools": schemas})
    lacking = "" if told != rendered(tokenizer, chat, kwargs) else "does not tell a model of its tools"
    if not lacking:
        answer = [{"role": "tool", "name": schemas[0]["function"]["name"], "content": _PROBE}]
        try:
            suffix = tokenizer.decode(answer_ids(tokenizer, answer, kwargs))
            lacking = "" if _PROBE in suffix else "does not show the answers of tools"
        except UserError as error:
            lacking = f"can't show the answers of tools ({error})"
    if lacking:
        raise UserError(
            f"The chat template {lacking}; take a model that was trained to call tools (Qwen2.5-Instruct, Qwen3, "
            "Llama-3.1-Instruct, ...), or pass another --chat-template."
        )


def answer_ids(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Message], kwargs: dict[str, Any]) -> list[int]:
    """The tokens behind an assistant's turn that has ended with its end token: these messages of role `tool`, and the
    header of the next assistant's turn.

    A short conversation is rendered with and without the answers: what was really said is never rendered again.

    Raises:
        UserError: the template writes what came before in another way once something follows.
    """
    call = {"type": "function", "function": {"name": answers[0].get("name", "tool"), "arguments": {}}}
    before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        front = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=False, **kwargs)
        whole = tokenizer.apply_chat_template([*before, *answers], tokenize=False, add_generation_prompt=True, **kwargs)
    except Exception as error:  # a template is a program of somebody else's
        raise UserError(f"The chat template refuses the answer of a tool ({one_line(error)}).") from error
    front, whole = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (front, whole))
    # Behind the end token many templates write a line break, which was not sampled: it belongs to what follows.
    ends = [i for i, token in enumerate(front) if token == tokenizer.eos_token_id]
    front = front[: ends[-1] + 1] if ends else front
    if whole[: len(front)] != front:
        raise UserError("the chat template writes an assistant's turn in another way once an answer follows it")
    return whole[len(front) :]


def parsed(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, names: Sequence[str]) -> Message:
    """An assistant's message: its `content`, and `tool_calls` where there are any.

    Args:
        text: of `ids`, without what ends it.
        names: of the tools that there are; a bare JSON object is a call of one of these alone.
    """
    for of in ("response_template", "response_schema"):
        if getattr(tokenizer, of, None):
            try:
                found = tokenizer.parse_response(list(ids))
            except Exception:  # cut in the middle, or no such form: text, as TRL has it
                return {"role": "assistant", "content": text}
            return {"role": "assistant", "content": text, **found}
    content, calls = _calls_in(text, str(tokenizer.chat_template or ""), names)
    message: Message = {"role": "assistant", "content": content}
    return {**message, "tool_calls": calls} if calls else message


def _calls_in(text: str, template: str, names: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """(the text that is no call, calls)."""
    if "[TOOL_CALLS]" in template and (found := _MISTRAL.search(text)):
        calls = _read(found.group(1))
        return (text[: found.start()].strip(), calls) if calls else (text, [])
    if "<tool_call>" in template or "tool_call" not in template:
        blocks = list(_HERMES.finditer(text))
        calls = [call for block in blocks for call in _read(block.group(1)) or [None]]
        if blocks and None not in calls:
            return _HERMES.sub("", text).strip(), calls
    calls = _read(_FENCE.sub(r"\1", text.replace("<|python_tag|>", "").strip()))
    if calls and all(call["function"]["name"] in names for call in calls):
        return "", calls
    return text, []


def _read(text: str) -> list[dict[str, Any]]:
    """Calls out of JSON, one or a list; empty where it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return []
    calls = []
    for one in found if isinstance(found, list) else [found]:
        one = one.get("function", one) if isinstance(one, dict) else {}
        one = one if isinstance(one, dict) else {}
        arguments = one.get("arguments", one.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return []
        if not isinstance(one.get("name"), str) or not isinstance(arguments, dict):
            return []
        calls.append({"type": "function", "function": {"name": one["name"], "arguments": arguments}})
    return calls


def is_async(tool: Callable) -> bool:
    return inspect.iscoroutinefunction(tool) or inspect.iscoroutinefunction(getattr(type(tool), "__call__", None))  # noqa: B004
