"""The forms in which models write calls of tools, each as its chat template shows it.

    hermes      <tool_call>{"name": ..., "arguments": {...}}</tool_call>    Qwen2.5, Qwen3, Hermes, MiniMind, SmolLM3
    piped       <|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>    Phi-4-mini, Granite
    qwen_xml    <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>    Qwen3-Coder
    glm_xml     <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>    GLM-4.5
    mistral     [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]NAME[ARGS]{...}    Mistral
    deepseek    <｜tool▁call▁begin｜>[function<｜tool▁sep｜>]NAME...{...}<｜tool▁call▁end｜>    DeepSeek V3, R1
    json        {"name": ..., "parameters": {...}}, nothing else    Llama 3

Which one a model writes is found by rendering a call and reading it back. A message with a call that can't be read is
text as a whole, as in TRL: half of what a model asked for is not done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Arguments = dict[str, Any]


class Call(NamedTuple):
    """`typed`: its values are of JSON; else they are texts, whose types only the tool's schema knows."""

    name: str
    arguments: Arguments
    typed: bool = True


class Unreadable(ValueError):
    """Something begins as a call does, and is none."""


def of_json(value: Any) -> Call:
    """Raises:
    Unreadable: it is no object with a name and arguments."""
    value = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise Unreadable(f"no call: {value!r}")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _loads(arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise Unreadable(f"no arguments: {arguments!r}")
    return Call(value["name"], arguments or {})


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from error


def _as_json(body: str) -> list[Call]:
    found = _loads(body)
    return [of_json(one) for one in found] if isinstance(found, list) else [of_json(found)]


_FUNCTION = re.compile(r"<function=([^\n>]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\s*?\n?(.*?)\n?\s*?</parameter>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_DEEPSEEK = re.compile(
    r"(?:function<｜tool▁sep｜>)?([^\s<]+)(?:<｜tool▁sep｜>|\s)\s*(?:```json\s*)?(\{.*\})\s*(?:```)?", re.DOTALL
)
_ARGS = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?\s*\[ARGS\]\s*")


def _as_qwen_xml(body: str) -> list[Call]:
    found = _FUNCTION.fullmatch(body.strip())
    if found is None:
        raise Unreadable(body)
    return [Call(found[1].strip(), {key.strip(): value for key, value in _PARAMETER.findall(found[2])}, typed=False)]


def _as_glm_xml(body: str) -> list[Call]:
    name, pairs = re.match(r"\s*([\w.-]+)\s*", body), _ARGUMENT.findall(body)
    if name is None or _ARGUMENT.sub("", body[name.end() :]).strip():
        raise Unreadable(body)
    return [Call(name[1], {key.strip(): value.strip() for key, value in pairs}, typed=False)]


def _as_deepseek(body: str) -> list[Call]:
    found = _DEEPSEEK.fullmatch(body.strip())
    if found is None:
        raise Unreadable(body)
    return [of_json({"name": found[1], "arguments": _loads(found[2])})]


class Tagged:
    """Calls between two tags. The last one may lack its closing tag: some end tokens stand in for it.

    Args:
        body: what stands between them, to calls.
        around: tags around several calls, which say nothing.
    """

    def __init__(
        self, name: str, begin: str, end: str, body: Callable[[str], list[Call]], around: tuple[str, ...] = ()
    ):
        self.name, self._body, self._around = name, body, around
        self._block = re.compile(f"{re.escape(begin)}(.*?)(?:{re.escape(end)}|\\Z)", re.DOTALL)

    def read(self, text: str) -> tuple[str, list[Call]]:
        """(what is no call, calls).

        Raises:
            Unreadable: one of them can't be read.
        """
        calls = [call for block in self._block.findall(text) for call in self._body(block)]
        if not calls:
            return text, []
        rest = self._block.sub("", text)
        for tag in self._around:
            rest = rest.replace(tag, "")
        return rest.strip(), calls


class _Mistral:
    name = "mistral"

    def read(self, text: str) -> tuple[str, list[Call]]:
        content, *blocks = text.split("[TOOL_CALLS]")
        calls = []
        for block in blocks:
            head = _ARGS.match(block)
            calls += [Call(head[1], of_json({"name": head[1], "arguments": _loads(block[head.end() :])}).arguments)] \
                if head else _as_json(block.strip())  # fmt: skip
        return (content.strip(), calls) if calls else (text, [])


class _Json:
    name = "json"

    def read(self, text: str) -> tuple[str, list[Call]]:
        """Where a text is one such object; of any other it says nothing."""
        bare = text.replace("<|python_tag|>", "").strip()  # before Llama's calls of code
        if not (bare.startswith("{") and bare.endswith("}")):
            return text, []
        found = [of_json(_loads(part)) for part in re.split(r"(?<=\})\s*;\s*(?=\{)", bare)]
        return "", found


FORMATS = (
    Tagged("hermes", "<tool_call>", "</tool_call>", _as_json),
    Tagged("qwen_xml", "<tool_call>", "</tool_call>", _as_qwen_xml),
    Tagged("glm_xml", "<tool_call>", "</tool_call>", _as_glm_xml),
    Tagged("piped", "<|tool_call|>", "<|/tool_call|>", _as_json),
    Tagged("deepseek", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", _as_deepseek,
           ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")),
    _Mistral(),
    _Json(),
)  # fmt: skip
_BY_NAME = {form.name: form for form in FORMATS}


def format_of(rendered_call: str, name: str, arguments: Arguments) -> str | None:
    """The form in which a template wrote a call of `name` with `arguments` (texts): the one by which it is read back.

    Args:
        rendered_call: the assistant's turn, perhaps with what stands around it.
    """
    # What ends the turn is none of the call.
    for form in FORMATS:
        text = rendered_call
        if form.name == "json":
            first, last = text.find("{"), text.rfind("}")
            text = text[first : last + 1] if first >= 0 else ""
        elif form.name == "mistral":
            last = max(text.rfind("]"), text.rfind("}"))
            text = text[: last + 1]
        try:
            _, calls = form.read(text)
        except Unreadable:
            continue
        if any(call.name == name and call.arguments == arguments for call in calls):
            return form.name
    return None


def read_calls(text: str, form: str, properties: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """(content, calls as a message has them) of what a model said; without a call, or with one that can't be read, the
    text as it is.

    Args:
        form: of FORMATS, by name.
        properties: tool -> parameter -> its JSON schema, by which texts become numbers. A text that is nothing but a
            JSON object is a call of one of these tools alone, in whatever form its model should write.
    """
    content, calls = _read(form, text)
    if not calls:
        content, calls = _read("json", _FENCE.sub(r"\1", text.strip()))
        if not calls or any(call.name not in properties for call in calls):
            return text, []
    said = [
        {"type": "function", "function": {"name": call.name, "arguments": _typed(call, properties.get(call.name, {}))}}
        for call in calls
    ]
    return content, said


# What a model writes around JSON by habit.
_FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)


def _read(form: str, text: str) -> tuple[str, list[Call]]:
    try:
        return _BY_NAME[form].read(text)
    except Unreadable:
        return text, []


# As templates in Jinja print them.
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_NUMBERS: dict[str, tuple[type, ...]] = {"integer": (int,), "number": (int, float), "boolean": (bool,)}


def _typed(call: Call, schema: Mapping[str, Any]) -> Arguments:
    """Its arguments with the types that the tool asks for, where a text is written for one of another type."""

    def typed(key: str, value: Any) -> Any:
        kinds = (schema.get(key) or {}).get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds or []
        if not isinstance(value, str) or "string" in kinds:
            return value
        try:
            found = json.loads(_PYTHON.get(value, value))
        except (ValueError, RecursionError):
            return value
        if not kinds:
            return value if call.typed else found
        wanted = {**_NUMBERS, "array": (list,), "object": (dict,), "null": (type(None),)}
        # True is an int in Python, and none in JSON.
        fits = [
            k for k in kinds if isinstance(found, wanted.get(k, ())) and (isinstance(found, bool) == (k == "boolean"))
        ]
        return found if fits else value

    return {key: typed(key, value) for key, value in call.arguments.items()}
