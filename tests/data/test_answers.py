"""Answers as text: of a struct's one field, a class's name, a list's one value; never a Python object's text."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lowvram_grpo.data.answers import Answer
from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.maths import accuracy


def answers(values, column="extra", features=None):
    data = Dataset.from_dict({"extra": values}, features=features)
    answer = Answer(data, column)
    return [answer.of(row, i) for i, row in enumerate(data)], answer.notice


@pytest.mark.parametrize(
    "value,field",
    [
        ({"ground_truth": "7", "split": "train", "index": 107}, "ground_truth"),
        ({"style": "rule", "ground_truth": "7"}, "ground_truth"),  # verl's reward_model
        ({"split": "train", "index": 107, "answer": "7", "question": "3+4"}, "answer"),  # and its extra_info
        ({"text": ["7", "7"], "answer_start": [3, 9]}, "text"),  # SQuAD
        ({"number": 7.0}, "number"),
        ({"ground_truth": {"target": ["7"]}, "style": "rule"}, "target"),
    ],
)
def test_the_one_field_that_is_the_answer_is_taken_and_said(value, field):
    found, notice = answers([value] * 2)
    assert found == ["7", "7"] and f"field {field!r} of column 'extra'" in notice
    assert accuracy(["<answer>7</answer>", "<answer>107</answer>"], answer=found) == [1.0, 0.0]


def test_a_struct_without_one_such_field_is_refused_with_its_fields():
    with pytest.raises(UserError, match=r"no field of a name that answers have.*one of extra.split, extra.index"):
        answers([{"split": "train", "index": 107}])
    with pytest.raises(UserError, match=r"ground_truth and answer among its fields.*--answer-column with one of"):
        answers([{"ground_truth": "7", "answer": "8"}])
    assert answers([{"ground_truth": "7", "answer": "8"}], "extra.answer") == (["8"], "")
    with pytest.raises(UserError, match="has no field 'gold'; its fields: ground_truth, answer"):
        answers([{"ground_truth": "7", "answer": "8"}], "extra.gold")


def test_a_class_is_its_name():
    features = Features({"extra": ClassLabel(names=["World", "Sports"])})
    found, notice = answers([1, 0, None, -1], features=features)
    assert found == ["Sports", "World", None, None] and "names of the classes" in notice


def test_numbers_are_written_as_a_person_would():
    assert answers([18.0, None, 2.5, float("nan"), 1e22])[0] == ["18", None, "2.5", None, str(10**22)]
    assert answers([7, -3])[0] == ["7", "-3"] and answers([True, False])[0] == ["True", "False"]


def test_a_list_of_one_value_is_that_value():
    assert answers([["18"], ["7", "7", None], [], None])[0] == ["18", "7", None, None]
    with pytest.raises(UserError, match=r"Row 1: the answer in column 'extra' is a list of 2 different values"):
        answers([["18"], ["18", "eighteen"]])


def test_a_completion_of_messages_is_what_the_assistant_says():
    chat = [[{"role": "assistant", "content": "It is 7."}]]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "7."}]}]]
    assert answers(chat)[0] == answers(parts)[0] == ["It is 7."]


def test_what_is_no_text_is_refused():
    with pytest.raises(UserError, match="Row 0: the answer in column 'extra' is bytes"):
        answers([b"7"], features=Features({"extra": Value("binary")}))
