"""Calls are read as models write them, answers stand behind what was sampled; TRL's parser is the oracle."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from chat_tokenizer import PLAIN, calling, chat_tokenizer, ids_of

from lowvram_grpo import UserError
from lowvram_grpo.data.call_formats import format_of, read_calls
from lowvram_grpo.data.tool_calls import ToolSpeech, schemas_of

TRL = importlib.util.find_spec("trl")
needs_trl = pytest.mark.skipif(TRL is None, reason="TRL is the oracle")


def multiply(a: int, b: float = 1.0, note: str = "", exact: bool = False) -> float:
    """Multiplies.

    Args:
        a: The first.
        b: The second.
        note: Any text.
        exact: Whether it matters.
    """
    return a * b


SCHEMAS = schemas_of([multiply])
PROPERTIES = {"multiply": SCHEMAS[0]["function"]["parameters"]["properties"]}
ANSWER = [{"role": "tool", "name": "multiply", "content": "12"}]


def read(text, form="hermes"):
    content, calls = read_calls(text, form, PROPERTIES)
    return content, [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


WRITTEN = {
    "hermes": 'So:\n<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "note": "4"}}\n</tool_call>',
    "piped": 'So:<|tool_call|>[{"name": "multiply", "arguments": {"a": 3, "note": "4"}}]<|/tool_call|>',
    "qwen_xml": "So:\n<tool_call>\n<function=multiply>\n<parameter=a>\n3\n</parameter>\n<parameter=note>\n4\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm_xml": "So:\n<tool_call>multiply\n<arg_key>a</arg_key>\n<arg_value>3</arg_value>\n<arg_key>note</arg_key>\n"
    "<arg_value>4</arg_value>\n</tool_call>",
    "mistral": 'So:[TOOL_CALLS][{"name": "multiply", "arguments": {"a": 3, "note": "4"}}]',
    "deepseek": "So:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>multiply\n```json\n"
    '{"a": 3, "note": "4"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
}


@pytest.mark.parametrize("form", WRITTEN)
def test_each_form(form):
    """With the types that the tool asks for: `note` is a text, whatever stands in it."""
    assert read(WRITTEN[form], form) == ("So:", [("multiply", {"a": 3, "note": "4"})])
    assert read("Nothing to call.\n", form) == ("Nothing to call.\n", [])


def test_more_of_them():
    assert read('[TOOL_CALLS]multiply[ARGS]{"a": 3}[TOOL_CALLS]multiply[ARGS]{"a": 4}', "mistral") == (
        "", [("multiply", {"a": 3}), ("multiply", {"a": 4})],
    )  # fmt: skip
    assert read('{"name": "multiply", "parameters": {"a": "3"}}', "json") == ("", [("multiply", {"a": 3})])
    assert read('<｜tool▁call▁begin｜>multiply<｜tool▁sep｜>{"a": 3}<｜tool▁call▁end｜>', "deepseek")[1] == [
        ("multiply", {"a": 3})
    ]
    assert read("<tool_call>multiply</tool_call>", "glm_xml")[1] == [("multiply", {})]
    # The last tag may be missing, arguments too, and may be JSON in a text.
    assert read('<tool_call>{"name": "multiply"}')[1] == [("multiply", {})]
    assert read('<tool_call>{"name": "multiply", "arguments": "{\\"a\\": 1}"}</tool_call>')[1] == [
        ("multiply", {"a": 1})
    ]


def test_types_by_the_schema():
    text = (
        '<tool_call>{"name": "multiply", "arguments": {"a": "3", "b": "0.5", "exact": "true", "note": "7"}}</tool_call>'
    )
    assert read(text)[1] == [("multiply", {"a": 3, "b": 0.5, "exact": True, "note": "7"})]
    # What is no number stays, for the tool to refuse; a number is no boolean.
    wrong = '<tool_call>{"name": "multiply", "arguments": {"a": "three", "exact": "1", "more": "5"}}</tool_call>'
    assert read(wrong)[1] == [("multiply", {"a": "three", "exact": "1", "more": "5"})]


@pytest.mark.parametrize("text", [
    '<tool_call>{"name": "multiply", "arg</tool_call>', "<tool_call>[1]</tool_call>",
    '<tool_call>{"nam": "x"}</tool_call>',
    '<tool_call>{"name": "multiply"}</tool_call><tool_call>broken</tool_call>', "<tool_call>",
    '<tool_call>{"name": "multiply", "arguments": [1]}</tool_call>', "[" * 5000,
])  # fmt: skip
def test_a_message_with_a_broken_call_is_text(text):
    assert read(text) == (text, [])


def test_bare_json_is_a_call_of_tools_that_there_are():
    assert read('```json\n{"name": "multiply", "arguments": {"a": 1}}\n```') == ("", [("multiply", {"a": 1})])
    for text in ('{"name": "other", "arguments": {}}', '{"a": 1}', "{}", "7", 'I say {"name": "multiply"}'):
        assert read(text) == (text, [])


def test_forms_are_told_apart_by_what_the_template_writes():
    for form, text in WRITTEN.items():
        assert (
            format_of(text, "multiply", {"a": "3", "note": "4"} if form.endswith("xml") else {"a": 3, "note": "4"})
            == form
        )
    assert format_of("multiply(a=3)", "multiply", {"a": 3}) is None


def test_answers_stand_behind_the_end_token():
    """Though the template writes a turn in another way once something follows."""
    tokenizer = chat_tokenizer()
    speech = ToolSpeech(tokenizer, SCHEMAS, {})
    ids = speech.answer_ids(ANSWER * 2, {})
    answer = "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n"
    assert tokenizer.decode(ids) == f"\n{answer}{answer}<|im_start|>assistant\n"
    # And are the tokens that the whole conversation has there.
    turn = calling("multiply", a=3)
    whole = f"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{turn}"
    assert ids_of(tokenizer, whole) + ids == ids_of(tokenizer, whole + tokenizer.decode(ids))
    assert speech.message([], turn.removesuffix("<|im_end|>"))["tool_calls"][0]["function"]["arguments"] == {"a": 3}


def test_a_turn_that_ends_in_another_token():
    """GLM's ends in the token that the template writes before the answer: it was sampled, and does not come twice."""
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}<|a|>{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>"
        "{% endfor %}{% elif m.role == 'tool' %}<|o|>{{ m.content }}{% else %}<|u|>{{ m.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|a|>{% endif %}"
    )
    tokenizer = chat_tokenizer(template, ("<|pad|>", "<|end|>", "<|o|>", "<|a|>", "<|u|>"))
    speech = ToolSpeech(tokenizer, SCHEMAS, {})
    assert tokenizer.decode(speech.answer_ids(ANSWER, {}, ends=(1, 2))) == "12<|a|>"
    assert tokenizer.decode(speech.answer_ids(ANSWER, {}, ends=(1,))) == "<|o|>12<|a|>"


def test_templates_that_do_not_do():
    for template, why in (
        (PLAIN, "does not tell a model of its tools"),
        ("{{ tools }}" + PLAIN, "shows no calls of tools"),
        (
            "{% for t in tools or [] %}x{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}"
            "{{ raise_exception('no tools here') }}{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
            "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>{% endfor %}",
            "can't show the answers of tools .*no tools here",
        ),
    ):
        with pytest.raises(UserError, match=f"does not support tool calling: it {why}"):
            ToolSpeech(chat_tokenizer(template), SCHEMAS, {})


def test_a_tool_without_a_docstring_is_named():
    def bare(a):
        return a

    with pytest.raises(UserError, match="The tool 'bare' can't be described to the model"):
        schemas_of([bare])


def test_a_tokenizer_that_reads_itself():
    tokenizer = chat_tokenizer(PLAIN.replace("{% for", "{{ tools }}{% for", 1))
    tokenizer.response_template = {
        "defaults": {"role": "assistant"}, "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
        },
    }  # fmt: skip
    if not hasattr(tokenizer, "parse_response"):
        pytest.skip("this transformers does not read responses")
    speech = ToolSpeech(tokenizer, SCHEMAS, {})
    turn, before = ids_of(tokenizer, calling("multiply", a="3")), ids_of(tokenizer, "<|im_start|>assistant\n")
    message = speech.message(turn, "ignored", before)
    assert message["content"] == "" and message["tool_calls"][0]["function"]["name"] == "multiply"
    broken = ids_of(tokenizer, '<tool_call>{"name"</tool_call><|im_end|>')
    assert speech.message(broken, "as text", before) == {"role": "assistant", "content": "as text"}


def _templates():
    folder = Path(TRL.origin).parent / "chat_templates" if TRL else Path()
    names = (
        "qwen2_5",
        "qwen3",
        "qwen3_instruct_2507",
        "qwen3_5_think",
        "glm4moe",
        "llama3_1",
        "llama3_2",
        "nemotron_3_nano",
    )
    return {name: folder / f"{name}.jinja" for name in names}


TURNS = [
    [("multiply", {"a": 3, "b": 4.5})], [("multiply", {"a": 3}), ("multiply", {"a": -1, "note": "4"})],
    [("multiply", {"a": 3, "note": "a {curly} \"text\"\nof two lines", "exact": True})],
]  # fmt: skip


@needs_trl
@pytest.mark.parametrize("name", _templates())
def test_calls_and_answers_are_trls(name):
    """What the template writes for a call is read as TRL reads it, and answers are TRL's tokens."""
    from types import SimpleNamespace

    from trl.chat_template_utils import (
        add_response_schema,
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        parse_response,
    )
    from trl.trainer.grpo_trainer import GRPOTrainer

    special = ("<|pad|>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    end = "<|eot_id|>" if name.startswith("llama") else "<|im_end|>"
    if name == "glm4moe":
        special, end = ("<|pad|>", "<|end|>", "<|user|>", "<|observation|>", "<|assistant|>"), "<|user|>"
    tokenizer = chat_tokenizer(_templates()[name].read_text(encoding="utf-8"), special)
    tokenizer.eos_token = end
    ours = ToolSpeech(tokenizer, SCHEMAS, {})
    theirs = chat_tokenizer(tokenizer.chat_template, special)
    theirs.eos_token = end
    add_response_schema(theirs)
    asked = [{"role": "user", "content": "x"}]
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    for calls in TURNS[:1] if name.startswith("llama") else TURNS:
        said = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
        turn = {"role": "assistant", "content": "", "tool_calls": said}
        text = tokenizer.apply_chat_template([*asked, turn], tokenize=False)[len(before) :]
        text = text[: text.index(end) + len(end)] if end in text else text + end
        ids = ids_of(tokenizer, text)
        expected = parse_response(theirs, ids, prefix=ids_of(theirs, before), tools=[multiply])
        found = ours.message(ids, text.removesuffix(end))
        assert found["tool_calls"] == expected["tool_calls"], name
        assert found["content"].replace("</think>", "").replace("<think>", "").strip() == expected["content"]
    stub = SimpleNamespace(
        processing_class=theirs, _tokenizer=theirs, _is_vlm=False, chat_template_kwargs={},
        chat_template=None if is_chat_template_prefix_preserving(theirs) else get_training_chat_template(theirs),
    )  # fmt: skip
    if name != "glm4moe":  # whose turns end in what TRL takes for a part of the answer
        assert ours.answer_ids(ANSWER, {}) == GRPOTrainer._get_tool_suffix_ids(stub, ANSWER)
