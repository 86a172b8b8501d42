from __future__ import annotations

import pytest

from lowvram_grpo.rewards import (
    format_reward,
    get_code_format_reward,
    reasoning_steps_reward,
    tag_count_reward,
    think_format_reward,
)

WHOLE = "<think>\nwhy\n</think>\n<answer>\nthat\n</answer>"


def score(reward, *replies):
    found = reward([[{"role": "assistant", "content": reply}] for reply in replies])
    assert found == reward(list(replies)), "text as well as messages"
    return found


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        (WHOLE, 1.0),
        (WHOLE + "\nand more", 1.0),  # a line may follow, as in Open R1
        (WHOLE + " and more", 0.0),
        ("<think>\na\n\nb\n</think>\n<answer>\n1\n2\n</answer>", 1.0),
        (f" {WHOLE}", 0.0),
        (WHOLE.replace("\n", ""), 0.0),
        (WHOLE.replace("</think>\n", "</think>\n\n"), 0.0),
        ("<answer>\nthat\n</answer>\n<think>\nwhy\n</think>", 0.0),
        ("<think>\nwhy\n</think>\n<answer>\nthat", 0.0),
        ("", 0.0),
    ],
)
def test_format_wants_each_tag_on_its_line(reply, reward):
    assert score(format_reward, reply) == [reward]


def test_think_format_is_trls():
    good = ["<think>a</think>b", "<think>a</think>", "<think></think>", "<think>\na\n</think>\nb\n</think>", WHOLE]
    bad = ["<think>a<think>b</think>", "a<think>b</think>", "<think>a</think>b<think>", "<think>a", "</think>", ""]
    replies = good + bad
    assert score(think_format_reward, *replies) == [1.0] * 5 + [0.0] * 6
    oracle = pytest.importorskip("trl.rewards").think_format_reward
    assert score(think_format_reward, *replies) == oracle([[{"content": reply}] for reply in replies])


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        (WHOLE, 1.0),
        (WHOLE.replace("<think>\n", ""), 0.75),
        (WHOLE.replace("<think>\n", "<think>"), 0.75),
        (WHOLE.replace("</think>", "</think></think>"), 0.75),
        (f"{WHOLE}\n{WHOLE}", 0.0),
        ("<answer>\n", 0.0),
        ("x\n</answer>", 0.25),
    ],
)
def test_tag_count_gives_a_quarter_for_each_tag_that_stands_once(reply, reward):
    assert score(tag_count_reward, reply) == [reward]


@pytest.mark.parametrize(
    ("reply", "steps"),
    [
        ("Step 1: a\nStep 22: b\nStep 3: c\nStep 4: d", 3),
        ("First, a. Second, b.", 2),
        ("1. a\n2. b\n3. c", 1),  # only at the beginning, as in Open R1
        ("a\n- b\n* c", 2),
        ("- a", 0),
        ("Step one: a. First a.", 0),
    ],
)
def test_reasoning_steps_are_thirds(reply, steps):
    assert score(reasoning_steps_reward, reply) == [pytest.approx(steps / 3)]


def test_code_format_wants_a_block_of_the_language_in_the_answer():
    python = WHOLE.replace("that", "so:\n```python\nprint(1)\n```\ndone")
    cpp = WHOLE.replace("that", "```c++\nint x;\n```")
    in_the_thought = WHOLE.replace("why", "```python\nprint(1)\n```")
    reward = get_code_format_reward()
    assert reward.__name__ == "code_format_reward"
    assert score(reward, python, cpp, in_the_thought, WHOLE, "```python\nprint(1)\n```") == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert score(get_code_format_reward("c++"), python, cpp) == [0.0, 1.0]
    assert reward([python, cpp], language=["python", "c++"]) == [1.0, 1.0], "a column of the data decides"
