"""Tools in a conversation: how a model is told of them, what it wrote where it calls one, and how an answer is rendered
behind what it wrote without touching a token of that.

A model calls tools in the form that its chat template shows (`call_formats.py`), or in that of the tokenizer's own
`response_template` or `response_schema` (transformers >= 5), which go first. A turn that is nothing but the JSON of a
call of a tool that there is counts everywhere: small models leave the tags out. All else is text.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.call_formats import format_of, read_calls
from lowvram_grpo.data.rendering import rendered
from lowvram_grpo.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
_PROBE, _NAME, _SAID = "an answer 7431", "probe_tool", "x4f1c9"
# Mistral's templates want one of nine letters and digits; the others don't look.
_ID = "call00000"


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


def is_async(tool: Callable) -> bool:
    return inspect.iscoroutinefunction(tool) or inspect.iscoroutinefunction(getattr(type(tool), "__call__", None))  # noqa: B004


class ToolSpeech:
    """How one model is told of tools, calls them and hears their answers.

    Args:
        schemas: of all its tools (`schemas_of`).
        kwargs: of the chat template, without tools.

    Raises:
        UserError: its chat template can't do one of these.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Mapping[str, Any]], kwargs: dict[str, Any]
    ):
        self.tokenizer = tokenizer
        functions = [schema["function"] for schema in schemas]
        self._schemas = list(schemas)
        self._properties = {f["name"]: f.get("parameters", {}).get("properties", {}) for f in functions}
        self._form = None if _reads_itself(tokenizer) else self._form_of(kwargs)
        lacking = self._lacking(functions, kwargs)
        if lacking:
            raise UserError(
                f"The chat template does not support tool calling: it {lacking}; take a model that was trained to call "
                "tools (Qwen2.5-Instruct, Qwen3, Llama-3.1-Instruct, ...), or pass another --chat-template."
            )

    def _lacking(self, functions: list[Mapping[str, Any]], kwargs: dict[str, Any]) -> str:
        chat = [{"role": "user", "content": "Hello."}]
        if rendered(self.tokenizer, chat, {**kwargs, "tools": self._schemas}) == rendered(self.tokenizer, chat, kwargs):
            return "does not tell a model of its tools"
        if self._form is None and not _reads_itself(self.tokenizer):
            return "shows no calls of tools, or none in a form that is known here (a tokenizer may bring its " \
                "response_template)"  # fmt: skip
        answer = [{"role": "tool", "name": functions[0]["name"], "content": _PROBE}]
        try:
            shown = _PROBE in self.tokenizer.decode(self.answer_ids(answer, kwargs))
        except UserError as error:
            return f"can't show the answers of tools ({str(error).rstrip('.')})"
        return "" if shown else "does not show the answers of tools"

    def _form_of(self, kwargs: dict[str, Any]) -> str | None:
        """The form in which the template writes calls."""
        arguments = {"city": _SAID}
        for written in (arguments, json.dumps(arguments)):
            try:
                text = self._text([*_call(_NAME, written)], kwargs, answered=False)
            except Exception:  # it has no calls, or wants their arguments as text
                continue
            ends = [self.tokenizer.eos_token, *self.tokenizer.all_special_tokens]
            behind = text[text.index(_PROBE) + len(_PROBE) :] if _PROBE in text else text
            for end in filter(None, ends):
                if end not in _OF_CALLS:
                    behind = behind.replace(end, "")
            if form := format_of(behind, _NAME, arguments):
                return form
        return None

    def message(self, ids: Sequence[int], text: str, prefix: Sequence[int] = ()) -> Message:
        """An assistant's message: its `content`, and `tool_calls` where there are any.

        Args:
            ids: what it sampled in this turn.
            text: of `ids`, without what ends it.
            prefix: the tokens before it.
        """
        if self._form is None:
            return self._read_itself(ids, text, prefix)
        content, calls = read_calls(text, self._form, self._properties)
        message: Message = {"role": "assistant", "content": content}
        return {**message, "tool_calls": calls} if calls else message

    def _read_itself(self, ids: Sequence[int], text: str, prefix: Sequence[int]) -> Message:
        """By the tokenizer's own description of what its model writes; as text where that does not fit."""
        known, more = inspect.signature(self.tokenizer.parse_response).parameters, {}
        if getattr(self.tokenizer, "response_template", None):
            given = {"prefix": list(prefix), "tools": self._schemas}
            more = {name: value for name, value in given.items() if name in known}
        try:
            found = dict(self.tokenizer.parse_response(list(ids), **more))
            calls = [_normal(call) for call in found.pop("tool_calls", None) or []]
        except Exception:  # cut in the middle, or no such form: text, as TRL has it
            return {"role": "assistant", "content": text}
        content = str(found.get("content") or "").removesuffix(self.tokenizer.eos_token or "")
        message = {"role": "assistant", **found, "content": content}
        return {**message, "tool_calls": calls} if calls else message

    def answer_ids(
        self, answers: Sequence[Message], kwargs: Mapping[str, Any], ends: Collection[int] = ()
    ) -> list[int]:
        """The tokens behind an assistant's turn that has ended with its end token: these messages of role `tool`, and
        the header of the next assistant's turn.

        A short conversation is rendered, and what follows the end of its call is taken: what was really said is never
        rendered again. So it does not matter whether the template writes earlier turns in another way once something
        follows, as Qwen3's does, which drops their thoughts.

        Args:
            ends: ids that end a turn, beside the tokenizer's own.

        Raises:
            UserError: the template refuses such a conversation.
        """
        name = str(answers[0].get("name", "tool"))
        whole, at, failed = "", None, None
        for arguments in ({"x": _SAID}, json.dumps({"x": _SAID})):
            before = _call(name, arguments)
            try:
                probe = self._text([*before, {**answers[0], "content": _PROBE}], kwargs)
                whole = self._text([*before, *answers], kwargs)
                at = self._end_of_call(probe, self._text(before, kwargs, answered=False), ends)
            except Exception as error:  # a template is a program of somebody else's
                failed = error
                continue
            break
        if at is None or whole[:at] != probe[:at]:
            why = (
                one_line(failed) if failed is not None and at is None else "it has no place behind an assistant's turn"
            )
            raise UserError(f"The chat template refuses the answer of a tool ({why}).")
        front, ids = self._ids(whole[:at]), self._ids(whole)
        return ids[len(front) :] if ids[: len(front)] == front else self._ids(whole[at:])

    def _end_of_call(self, probe: str, alone: str, ends: Collection[int]) -> int | None:
        """Where in `probe` the call's turn has ended, of which `alone` is all without an answer."""
        said, answer = probe.find(_SAID), probe.rfind(_PROBE)
        tokens = {self.tokenizer.eos_token, *self.tokenizer.convert_ids_to_tokens(list(ends))} - {None}
        found = [at + len(token) for token in tokens if 0 <= said < (at := probe.find(token, said)) < answer]
        if found:
            # Behind the end token many templates write a line break, which was not sampled: it belongs to what follows.
            return min(found)
        return len(alone) if probe.startswith(alone) else None

    def _text(self, messages: list[Message], kwargs: Mapping[str, Any], *, answered: bool = True) -> str:
        messages = [{**m, "tool_call_id": _ID} if m["role"] == "tool" else m for m in messages]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answered, **{**kwargs, "tools": None}
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# Special tokens of some models that belong to a call.
_OF_CALLS = {
    "<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<|python_tag|>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
}  # fmt: skip


def _call(name: str, arguments: Any) -> list[Message]:
    """A conversation up to an assistant's turn that calls a tool."""
    call = {"id": _ID, "type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _reads_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    return any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema"))


def _normal(call: Any) -> dict[str, Any]:
    """A call as the other forms give it.

    Raises:
        ValueError: it is none.
    """
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict | None):
        raise ValueError(f"no call: {call!r}")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
