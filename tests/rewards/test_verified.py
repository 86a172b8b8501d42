from __future__ import annotations

import threading
import time

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards import accuracy_reward, reasoning_accuracy_reward, symbolic

# reply, reference, reward
CASES = [
    (r"It is \boxed{\frac{1}{2}}.", "0.5", 1.0),
    (r"It is \boxed{\frac{1}{2}}.", r"$\frac{2}{4}$", 1.0),
    (r"\boxed{3}", "6", 0.0),
    (r"First \boxed{2}, then \boxed{7}", r"\boxed{7}", 0.0),
    (r"so $x = 4$ and the answer is $5$", "5", 1.0),
    ("the answer is 5", "5", 0.0),
    ("so it costs $5$", "5", 0.0),  # nothing announces it
    (r"\boxed{1,2}", r"$\{1, 2\}$", 1.0),
    (r"\boxed{5\text{ cm}}", "$5$", 1.0),
    ("nothing at all", "$5$", 0.0),
    (r"\boxed{5}", "no mathematics here", None),
    (r"\boxed{5}", "", None),
    (r"\boxed{5}", r"We have $2+2=4$. Thus the answer is \boxed{5}.", 1.0),
]


def say(text):
    return [{"role": "assistant", "content": text}]


def columns(log):
    return lambda name, values: log.__setitem__(name, list(values))


@pytest.mark.parametrize(("reply", "gold", "reward"), CASES)
def test_a_whole_reply_is_left_to_math_verify(reply, gold, reward):
    assert accuracy_reward([say(reply)], [gold]) == [reward]
    assert accuracy_reward([reply], answer=[gold]) == [reward], "text, and the other column"


def test_rewards_and_columns_are_trls():
    oracle = pytest.importorskip("trl.rewards")
    replies, golds = [say(reply) for reply, *_ in CASES], [gold for _, gold, _ in CASES]
    thoughts = [say(f"<think>{reply}</think>{reply}") for reply, *_ in CASES] + [say(CASES[0][0])]
    ours, theirs = {}, {}
    assert accuracy_reward(replies, golds, log_extra=columns(ours)) == oracle.accuracy_reward(
        replies, golds, log_extra=columns(theirs)
    )
    assert ours == theirs and set(ours) == {"solution", "gold_parsed", "answer_parsed"}
    assert reasoning_accuracy_reward(thoughts, [*golds, "0.5"], log_extra=columns(ours)) == (
        oracle.reasoning_accuracy_reward(thoughts, [*golds, "0.5"], log_extra=columns(theirs))
    )
    assert ours == theirs


def test_only_what_follows_the_reasoning_counts():
    replies = [
        r"<think>\boxed{1}</think>\boxed{2}",
        r"<think>\boxed{2}",
        r"<think>a</think>\boxed{1}</think>\boxed{2}",
        r"\boxed{1}</answer>\boxed{2}",
    ]
    assert reasoning_accuracy_reward(replies, ["$2$"] * 4) == [1.0, 0.0, 1.0, 0.0]
    other = {"reasoning_delimiters": ["</answer>", "</think>"]}
    assert reasoning_accuracy_reward(replies, ["$2$"] * 4, **other) == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("reward", [accuracy_reward, reasoning_accuracy_reward])
def test_without_a_reference_there_is_one_sentence(reward):
    with pytest.raises(UserError, match=f"'{reward.__name__}' needs a column `solution` or `answer`"):
        reward(["x"], prompts=["y"])
    with pytest.raises(UserError, match="1 references for 2 completions"):
        accuracy_reward(["x", "y"], ["1"])


def test_a_comparison_that_does_not_end_is_wrong_in_any_thread(monkeypatch):
    worker = symbolic._Worker()
    monkeypatch.setattr(symbolic, "_worker", worker)
    monkeypatch.setattr(symbolic, "SECONDS", 2.0)
    assert accuracy_reward([r"\boxed{1}"], ["1"]) == [1.0]  # the helper has started
    found, start = [], time.monotonic()
    replies = [r"\boxed{(x+1)^{9999}}", r"\boxed{3x}"]
    thread = threading.Thread(target=lambda: found.extend(accuracy_reward(replies, ["$x^{9999}$", "$2x+x$"])))
    thread.start()
    thread.join()
    worker.stop()
    assert found == [0.0, 1.0] and time.monotonic() - start < 30
