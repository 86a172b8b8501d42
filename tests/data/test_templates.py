from __future__ import annotations

import re

import pytest

from lowvram_grpo.data.templates import PLAIN_CHAT_TEMPLATE, TEMPLATES, chat_template, is_inline, template
from lowvram_grpo.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "and?"},
]


def render(messages, bos: str | None = None, **kwargs):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "<bos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", bos_token=bos)
    return tokenizer.apply_chat_template(messages, chat_template=PLAIN_CHAT_TEMPLATE, tokenize=False, **kwargs)


@pytest.mark.parametrize("name", ["tldr", "tldr-zh"])
def test_tldr_asks_for_tags_and_shows_one_short_example(name):
    form = template(name)
    assert "<answer></answer>" in form.system_prompt
    (shot,) = form.few_shot
    summary = re.fullmatch(r"<answer>([^<]+)</answer>", shot["completion"]).group(1)
    assert len(summary) < len(shot["prompt"]) < 120


def test_the_chinese_template_is_chinese():
    chinese = re.compile("[\u4e00-\u9fff]")
    assert chinese.search(TEMPLATES["tldr-zh"].system_prompt)
    assert not chinese.search(TEMPLATES["tldr"].system_prompt)


def test_tldr_reference_is_the_answer_in_tags():
    assert template("tldr").reference({"answer": " Short. "}) == "<answer>Short.</answer>"
    assert template("tldr").reference({"answer": " "}) is None
    assert template("tldr").reference({"answer": None}) is None


def test_r1_reference_needs_reasoning_and_answer():
    reference = template("r1").reference
    assert reference({"reasoning": "1+1=2\n", "answer": "2"}) == ("<think>\n1+1=2\n</think>\n<answer>\n2\n</answer>")
    assert reference({"reasoning": "", "answer": "2"}) is None
    assert reference({"reasoning": "1+1=2", "answer": None}) is None


def test_unknown_template_is_named_with_a_suggestion():
    with pytest.raises(UserError, match=r"'tdlr' \(did you mean 'tldr'\?\); .*tldr, tldr-zh, r1"):
        template("tdlr")


def test_plain_chat_template_renders_each_turn():
    assert render(CHAT, bos="<bos>", add_generation_prompt=True) == (
        "<bos>System: Be brief.\nUser: hi\nAssistant:\nho<eos>\nUser: and?\nAssistant:\n"
    )


def test_plain_chat_template_without_bos_or_generation_prompt():
    assert render(CHAT[1:3]) == "User: hi\nAssistant:\nho<eos>\n"


def test_plain_chat_template_leaves_a_last_assistant_turn_open():
    assert render(CHAT[:3], continue_final_message=True).endswith("User: hi\nAssistant:\nho")


def test_chat_template_by_name_and_by_file(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }} é", encoding="utf-8")
    assert chat_template("plain") == PLAIN_CHAT_TEMPLATE
    assert chat_template(str(file)) == "{{ messages[0].content }} é"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{# " + "a long comment " * 30 + "#}{% endfor %}",
        "{{ messages[0].content }}",
        "{%- for m in messages -%}\n{{ m.content }}\n{%- endfor -%}\n",
    ],
)
def test_a_chat_template_may_stand_in_the_recipe_itself(source):
    assert is_inline(source) and chat_template(source) == source
    assert not is_inline("plain") and not is_inline("folder/mine.jinja")


def test_chat_template_mistakes_get_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"plian is neither `plain` \(did you mean 'plain'\?\) nor"):
        chat_template("plian")
    blank = tmp_path / "blank.jinja"
    blank.write_text(" \n", encoding="utf-8")
    with pytest.raises(UserError, match="empty file"):
        chat_template(str(blank))
    latin = tmp_path / "latin.jinja"
    latin.write_bytes(b"\xe9")
    with pytest.raises(UserError, match="UTF-8"):
        chat_template(str(latin))
