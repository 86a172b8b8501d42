"""Prompts as token ids: special tokens once, the turn left open, and the cut that keeps what asks for the answer."""

from __future__ import annotations

import pytest
from datasets import Dataset

from lowvram_grpo.data.encoding import check_prompts, encode_prompts, prompt_length_report, raw_text_notice
from lowvram_grpo.errors import UserError

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "system", "user", "assistant", *"abcdefgh"]
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' and no_system %}{{ raise_exception('no system turn') }}{% endif %}"
    "<bos> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def make_tokenizer(*, chat: bool = True, specials: str = "$A"):
    """Whole words; `specials` says what stands around a plain text, as in `<bos> $A <eos>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [(token, ids[token]) for token in ("<bos>", "<eos>")]
    words.post_processor = processors.TemplateProcessing(single=specials, special_tokens=around)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer, prompts, limit=None, **kwargs):
    ids, cut = encode_prompts(tokenizer, prompts, max_prompt_length=limit, chat_template_kwargs=kwargs or None)
    return [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in ids], cut


def user(text):
    return {"role": "user", "content": text}


def test_conversations_end_in_the_generation_prompt_with_special_tokens_once():
    tokenizer = make_tokenizer(specials="<bos> $A <eos>")
    assert encode(tokenizer, [[user("a b")]]) == (["<bos> user a b <eos> assistant"], 0)


def test_a_last_assistant_turn_goes_on():
    texts, _ = encode(make_tokenizer(), [[user("a"), {"role": "assistant", "content": "b c"}]])
    assert texts == ["<bos> user a <eos> assistant b c"]


@pytest.mark.parametrize(
    ("specials", "text"), [("$A", "a b"), ("<bos> $A", "<bos> a b"), ("<bos> $A <eos>", "<bos> a b")]
)
def test_plain_text_stays_open_at_its_end(specials, text):
    assert encode(make_tokenizer(chat=False, specials=specials), ["a b"]) == ([text], 0)


def test_an_eos_that_the_prompt_itself_contains_is_kept():
    assert encode(make_tokenizer(specials="$A <eos>"), ["a <eos>"])[0] == ["a <eos>"]


@pytest.mark.parametrize("specials", ["<bos> $A", "<bos> $A <eos>", "$A"])
@pytest.mark.parametrize("text", ["<bos> user a <eos> assistant", "<bos> a b"])
def test_text_that_begins_with_bos_itself_gets_no_second_one(specials, text):
    """It went through the chat template already, or somebody wrote it by hand."""
    assert encode(make_tokenizer(specials=specials), [text, "a"])[0][0] == text


def test_a_template_of_ones_own_and_the_encoder_agree():
    tokenizer = make_tokenizer(specials="<bos> $A")
    rendered = tokenizer.apply_chat_template([user("a b")], tokenize=False, add_generation_prompt=True)
    assert encode(tokenizer, [rendered]) == encode(tokenizer, [[user("a b")]])
    assert encode(make_tokenizer(specials="<bos> <bos> $A"), ["<bos> <bos> a", "<bos> a"])[0] == [
        "<bos> <bos> a",
        "<bos> <bos> <bos> a",
    ]


def test_a_prompt_that_would_go_through_the_template_twice_is_refused():
    tokenizer = make_tokenizer()
    data = Dataset.from_dict({"prompt": [[user("a")], [user("<bos> user a <eos> assistant")]]})
    with pytest.raises(UserError, match="begins with '<bos>' inside a user's turn"):
        check_prompts(tokenizer, data, chat_template_kwargs=None)
    check_prompts(tokenizer, data.select([0]), chat_template_kwargs=None)


USUAL = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}{{ m.role }} {{ m.content }} {% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("role", ["wizard", "human", "User", "developer"])
def test_a_role_that_the_template_leaves_out_is_refused(role):
    """Wherever it first stands; the model would never see what it says."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = USUAL
    usual = [{"role": "system", "content": "a"}, user("b"), {"role": "assistant", "content": "c"}, user("d")]
    check_prompts(tokenizer, Dataset.from_dict({"prompt": [usual]}), chat_template_kwargs=None)
    odd = [{"role": role, "content": "a"}, user("b")]
    with pytest.raises(UserError, match=f"leaves out messages of role '{role}'.*rename the role"):
        check_prompts(tokenizer, Dataset.from_dict({"prompt": [usual, odd]}), chat_template_kwargs=None)
    with pytest.raises(UserError, match=f"leaves out messages of role '{role}'"):
        check_prompts(tokenizer, Dataset.from_dict({"prompt": [odd[:1]]}), chat_template_kwargs=None)


def test_plain_text_past_a_chat_template_is_said():
    tokenizer = make_tokenizer()
    assert "without its chat template" in raw_text_notice(tokenizer, ["a b"])
    assert raw_text_notice(tokenizer, [[user("a")]]) is None
    tokenizer.chat_template = None  # a base model takes text as it is
    assert raw_text_notice(tokenizer, ["a b"]) is None


def test_text_parts_are_joined_and_images_refused():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert encode(make_tokenizer(), [[user(parts)]]) == encode(make_tokenizer(), [[user("a b")]])
    long = [{"type": "text", "text": TURN}]
    assert encode(make_tokenizer(), [[user(long)]], limit=40) == encode(make_tokenizer(), [[user(TURN)]], limit=40)
    with pytest.raises(UserError, match="A prompt has a message with a part of type 'image'; only text"):
        encode(make_tokenizer(), [[user([{"type": "image", "url": "x"}])]])


@pytest.mark.parametrize("words", [{"<eos>": 0}, {"<eos>": 0, "<unk>": 1}], ids=["no words", "only unk"])
@pytest.mark.parametrize("prompt", ["hi", [user("hi")]])
def test_a_tokenizer_that_transformers_made_from_nothing_is_named(words, prompt):
    """As for a model folder of Qwen2's or Gemma's kind without tokenizer files."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unk = {"unk_token": "<unk>"} if "<unk>" in words else {}
    empty = Tokenizer(models.BPE(words, [], **unk))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="<eos>", **unk)
    with pytest.raises(UserError, match=r"encodes nothing .* its files are missing; copy tokenizer.json"):
        check_prompts(tokenizer, Dataset.from_dict({"prompt": [prompt]}), chat_template_kwargs=None)
    if len(words) == 1:
        with pytest.raises(UserError, match="encodes nothing"):
            encode(tokenizer, [prompt])


def test_prompts_are_cut_on_the_left_and_counted():
    texts, cut = encode(make_tokenizer(), ["a b c d", "e f", [user("g h")]], limit=2)
    assert (texts, cut) == (["c d", "e f", "<eos> assistant"], 2)


def test_the_order_of_mixed_prompts_is_kept():
    texts, _ = encode(make_tokenizer(), ["a", [user("b")], "c"])
    assert texts == ["a", "<bos> user b <eos> assistant", "c"]


def test_no_chat_template_is_said_with_the_way_out():
    with pytest.raises(UserError, match=r"no chat template; pass --chat-template plain, or a \.jinja file"):
        encode(make_tokenizer(chat=False), [[user("a")]])


def test_a_refused_conversation_is_named_and_template_arguments_arrive():
    chat = [{"role": "system", "content": "a"}, user("b")]
    assert encode(make_tokenizer(), [chat])[0] == ["<bos> system a <eos> user b <eos> assistant"]
    with pytest.raises(UserError, match=r"refuses a conversation of system, user \(no system turn\)"):
        encode(make_tokenizer(), [chat], no_system=True)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        encode(make_tokenizer(), ["a", ""])


def test_length_report_counts_before_the_cut():
    data = Dataset.from_dict({"prompt": ["a", "a b c", "a b", "a b c d e"]})
    options = {"max_prompt_length": 2, "chat_template_kwargs": None}
    assert prompt_length_report(make_tokenizer(), data, **options)[:4] == (5, 2, 4, 4)
    assert prompt_length_report(make_tokenizer(), data, limit=3, **options)[:4] == (3, 1, 3, 4)
    assert prompt_length_report(make_tokenizer(), data.to_list(), **options | {"max_prompt_length": None})[:2] == (5, 0)


# The cut of a conversation

TURN = "a b " + "c d e f " * 30 + "g h"
SYSTEM = {"role": "system", "content": "h g f"}


def test_a_conversation_loses_the_middle_of_its_last_user_turn():
    """The system prompt, the examples and the generation prompt stay, and both ends of the turn."""
    chat = [SYSTEM, user("a"), {"role": "assistant", "content": "b"}, user(TURN)]
    before, behind = "<bos> system h g f <eos> user a <eos> assistant b <eos> user a b", "g h <eos> assistant"
    for limit in (36, 50, 80, 120):
        (text,), cut = encode(make_tokenizer(), [chat], limit=limit)
        assert cut == 1 and text.startswith(before) and text.endswith(behind)
        assert text.count("<unk>") == 1  # the mark of the gap
        assert limit - 4 <= len(text.split()) <= limit, "no more is lost than has to be"


def test_an_open_assistant_turn_survives_the_cut():
    chat = [user(TURN), {"role": "assistant", "content": "b c"}]
    (text,), _ = encode(make_tokenizer(), [chat], limit=40)
    assert text.startswith("<bos> user a b") and text.endswith("g h <eos> assistant b c")


@pytest.mark.parametrize(
    "chat",
    [
        [user(TURN), {"role": "assistant", "content": "b"}, user("a b")],  # the last turn is not what is long
        [{"role": "system", "content": TURN}],
        [{"role": "system", "content": TURN}, user(TURN)],
    ],
    ids=["long history", "no user", "long system prompt"],
)
def test_where_the_last_turn_leaves_no_room_the_left_end_goes(chat):
    whole = encode(make_tokenizer(), [chat])[0][0].split()
    assert encode(make_tokenizer(), [chat], limit=40) == ([" ".join(whole[-40:])], 1)


def test_a_cut_to_almost_nothing_of_the_turn_is_none():
    whole = encode(make_tokenizer(), [[user(TURN)]])[0][0].split()
    assert encode(make_tokenizer(), [[user(TURN)]], limit=12)[0] == [" ".join(whole[-12:])]


def test_text_without_spaces_is_cut_too():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate("?系统:用户助手一二三. ")}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="?")
    tokenizer.chat_template = "{% for m in messages %}用户:{{ m.content }}{% endfor %}助手:"
    ids, cut = encode_prompts(
        tokenizer, [[user("一" * 40 + "二" * 300 + "三" * 40)]], max_prompt_length=60, chat_template_kwargs=None
    )
    text = "".join(tokenizer.convert_ids_to_tokens(ids[0]))
    assert cut == 1 and 56 <= len(text) <= 60
    assert text.startswith("用户:一一") and " ... " in text and text.endswith("三三助手:")


@pytest.mark.parametrize(
    "prompts, limit, words",
    [
        ([[user("a")]], 40, ""),
        (
            [[user(TURN)], [user("a")]],
            40,
            "1 of 2 prompts is longer than max_prompt_length 40 and loses the middle of the last user turn.",
        ),
        ([[user(TURN)]] * 2, 12, "2 of 2 prompts are longer than max_prompt_length 12 and lose the left end (system"),
        (
            [[user(TURN)], [user(TURN), user("a")]],
            40,
            "2 of 2 prompts are longer than max_prompt_length 40; 1 loses the middle of the last user turn, 1 "
            "the left end (system prompt and examples first).",
        ),
        ([TURN], 40, "1 of 1 prompt is longer than max_prompt_length 40 and loses the left end (as in TRL)."),
    ],
)
def test_the_sentence_says_how_many_are_cut_and_where(prompts, limit, words):
    data = [{"prompt": prompt} for prompt in prompts]
    report = prompt_length_report(make_tokenizer(), data, max_prompt_length=limit, chat_template_kwargs=None)
    assert report.sentence(limit).startswith(words) and bool(report.sentence(limit)) is bool(words)
    assert encode(make_tokenizer(), prompts, limit=limit)[1] == report.cut
