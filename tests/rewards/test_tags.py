from __future__ import annotations

import pytest

from lowvram_grpo.rewards.tags import answer_text, completion_text, content, format, label, label_strict


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "a reply"}], "a reply"),
        (
            [{"role": "assistant", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "blocks"}]}],
            "in blocks",
        ),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}], "one\ntwo"),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text


def test_the_last_complete_pair_is_the_answer():
    assert answer_text("<answer>a</answer> no, <answer> b </answer> <answer>c") == "b"
    assert answer_text("<answer><answer>x</answer>") == "x"
    assert answer_text("no tags") is None


@pytest.mark.parametrize(
    ("reply", "pair", "strict"),
    [
        ("<answer>short</answer>", 5, 10),
        ("\n <answer>two\nlines</answer> \n", 5, 10),
        ("Sure! <answer>short</answer>", 5, 0),
        ("<answer>a</answer><answer>b</answer>", 5, 0),
        ("<answer><answer>a</answer></answer>", 5, 0),
        ("<answer>never closed", 0, 0),
        ("</answer>backwards<answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_label_and_label_strict(reply, pair, strict):
    message = [{"role": "assistant", "content": reply}]
    assert label(completions=[reply, message]) == [pair, pair]
    assert label_strict(completions=[reply, message]) == [strict, strict]


@pytest.mark.parametrize(
    ("reply", "reference", "reward"),
    [
        ("<answer>cat</answer>", "a cat sat", 5),
        ("<answer>a cat sat</answer>", "a cat sat", 0),
        ("<answer>a cat sat down</answer>", "a cat sat", 0),
        ("<answer>   </answer>", "a cat sat", 0),
        ("cat", "a cat sat", 0),
        ("<answer>cat</answer>", None, None),
    ],
)
def test_content_wants_something_shorter_than_the_reference(reply, reference, reward):
    assert content(completions=[reply], answer=[reference]) == [reward]


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("<think>why</think><answer>42</answer>", 1),
        ("<think>\nwhy\n</think>\n\n<answer>\n42\n</answer>\n", 1),
        ("<think>why</think> so <answer>42</answer>", 0),
        ("<think>why</think><answer>42</answer> bye", 0),
        ("<think>a</think><think>b</think><answer>42</answer>", 0),
        ("<answer>42</answer><think>why</think>", 0),
        ("<answer>42</answer>", 0),
    ],
)
def test_format(reply, reward):
    assert format(completions=[reply]) == [reward]


@pytest.mark.parametrize(
    ("reply", "opened", "unopened"),
    [
        ("I add.\n</think>\n<answer>4</answer>", 1, 0),
        ("</think><answer>4</answer>", 1, 0),
        ("<think>I add.</think><answer>4</answer>", 1, 1),
        ("<think>I <think>add.</think><answer>4</answer>", 0, 0),
        ("I <think>add.</think><answer>4</answer>", 0, 0),
        ("I add.</think></think><answer>4</answer>", 0, 0),
        ("I add. <answer>4</answer>", 0, 0),
        ("<answer>4</answer>", 0, 0),
        ("I add.</think>So <answer>4</answer>", 0, 0),
        ("I add.</think><answer>4", 0, 0),
        ("I <answer>3</answer></think><answer>4</answer>", 0, 0),
    ],
)
def test_format_where_the_template_opens_the_thought(reply, opened, unopened):
    # What the template of a conversation ends with is not known here.
    turns = [{"role": "user", "content": "2+2?"}]
    message = [{"role": "assistant", "content": reply}]
    prompts = ["2+2?\n<think>\n", turns, "<think> first. 2+2?"]
    assert format(completions=[reply, message, reply], prompts=prompts) == [opened, opened, unopened]
    assert format(completions=[reply]) == [opened]
    # A thought before the pair is no pair alone.
    assert label_strict(completions=[reply]) == [10 if reply == "<answer>4</answer>" else 0]
