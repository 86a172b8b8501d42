"""An answer's tokens as text, and a conversation that fits the model."""

from __future__ import annotations

import pytest
from conftest import make_tokenizer

from lowvram_grpo.data.conversation import Conversation, TextStream
from lowvram_grpo.errors import UserError

TEXT = "Grüße: 你好, мир! 🎉🧑‍🚀 é — done"


def byte_level():
    """A token a byte, as GPT-2 and Qwen have them for what they know no longer token for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def byte_fallback():
    """As Llama 2 and Gemma: pieces with ▁ for a space, and <0xNN> for the bytes of what has no piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Gr:,!done", "▁done"]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_characters_of_several_tokens_come_out_whole(make):
    tokenizer = make()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(TEXT)  # some characters are several tokens
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""


def test_text_comes_as_soon_as_it_is_known():
    tokenizer = byte_level()
    stream = TextStream(tokenizer)
    ids = tokenizer("aé", add_special_tokens=False)["input_ids"]
    assert [stream.push(token) for token in ids] == ["a", "", "é"]


def test_an_unfinished_character_at_the_end_is_shown_once():
    tokenizer = byte_level()
    stream = TextStream(tokenizer)
    ids = tokenizer("a🎉", add_special_tokens=False)["input_ids"]
    assert [stream.push(token) for token in ids[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd" and stream.finish() == ""


def test_bytes_that_never_make_a_character_do_not_hold_up_the_rest():
    tokenizer = byte_level()
    stray = tokenizer("é", add_special_tokens=False)["input_ids"][1]  # a continuation byte
    stream = TextStream(tokenizer)
    pieces = [stream.push(stray) for _ in range(12)]
    assert sum(map(len, pieces)) >= 8
    assert stream.push(tokenizer("b", add_special_tokens=False)["input_ids"][0]).endswith("b")


def test_the_spaces_between_words_are_kept():
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    ids = tokenizer("a b c d")["input_ids"]
    assert "".join(stream.push(token) for token in ids) == tokenizer.decode(ids)


def chatting(positions=None, system="x", shots=()):
    return Conversation(
        make_tokenizer(chat=True),
        system=[{"role": "system", "content": system}] if system else [],
        shots=list(shots),
        positions=positions,
    )


def decoded(conversation, text, new_tokens=4):
    ids, dropped, _ = conversation.ask(text, new_tokens)
    return conversation.tokenizer.decode(ids).replace("<unk>", "?"), dropped


def test_system_and_examples_stand_before_every_turn():
    conversation = chatting(shots=[{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}])
    assert decoded(conversation, "a") == ("? x ? e ? f ? a ?", 0)
    conversation.answer("b")
    assert decoded(conversation, "c")[0] == "? x ? e ? f ? a ? b ? c ?"
    conversation.take_back()
    conversation.reset()
    conversation.set_system("")
    assert decoded(conversation, "d")[0] == "? e ? f ? d ?"


def test_the_oldest_turns_go_when_the_positions_are_used_up():
    conversation = chatting(positions=17)
    for turn in "abc":
        _, dropped = decoded(conversation, turn)
        conversation.answer("z")
    assert dropped == 0 and len(conversation.turns) == 6  # 13 tokens and 4 new ones just fit
    assert decoded(conversation, "d") == ("? x ? b ? z ? c ? z ? d ?", 2)
    assert conversation.turns[0] == {"role": "user", "content": "b"}


def test_a_long_turn_gets_as_short_an_answer_as_fits():
    conversation = chatting(positions=40)
    assert conversation.ask("a", 100).room == 40 - 5
    conversation.answer("b")
    assert conversation.ask("c " * 19, 100)[1:] == (2, 40 - 23)
    with pytest.raises(UserError, match="leaves no room"):
        conversation.ask("c " * 21, 100)


def test_a_turn_that_alone_exceeds_the_positions_is_refused_and_forgotten():
    conversation = chatting(positions=15)
    conversation.ask("a", 4)
    conversation.answer("b")
    with pytest.raises(UserError, match="15 positions"):
        conversation.ask("c " * 20, 4)
    assert [turn["content"] for turn in conversation.turns] == ["a", "b"]


def test_without_a_chat_template_a_text_is_continued_by_itself():
    conversation = Conversation(make_tokenizer(), system=[], shots=[], positions=None)
    assert not conversation.templated and decoded(conversation, "a b")[0] == "a b"
    conversation.answer("c")
    assert decoded(conversation, "d")[0] == "d"
