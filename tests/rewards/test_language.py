from __future__ import annotations

import pytest

from lowvram_grpo.rewards.language import language_consistency


@pytest.mark.parametrize(
    ("prompt", "reply", "share"),
    [
        ("What is this?", "A cat.", 1),
        ("What is this?", "一只猫", 0),
        ("What is this?", "ab 一只", 0.5),
        ("这是什么？", "一只猫", 1),
        # Four Han words outweigh two Latin ones of eleven letters each.
        ("请你解释 transformer architecture", "一种网络", 1),
        ("これは何ですか", "これは猫です", 1),
        ("这是什么？", "これは", 0),
        ("Что это?", "кот", 1),
        ("이것은 무엇입니까?", "cat", 0),
        ("这是什么？", r"<think>猫</think><answer>猫</answer> $x = y$ \frac ```print(x)```", 1),
        ("What is 17 + 25?", "42", None),
        ("17 + 25 =", "forty-two", None),
    ],
)
def test_share_of_letters_in_the_script_of_the_prompt(prompt, reply, share):
    assert language_consistency([prompt], [reply]) == [share]


def test_the_last_user_turn_sets_the_language():
    prompt = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "这是什么？"}]
    assert language_consistency([prompt], [[{"role": "assistant", "content": "猫"}]]) == [1.0]
