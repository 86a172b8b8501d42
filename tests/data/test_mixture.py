"""Several datasets as one, Open R1's dataset_mixture, and what a row brings along for its own prompt."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conftest import make_tokenizer
from datasets import Dataset

from lowvram_grpo.data.encoding import encode_prompts, row_kwargs
from lowvram_grpo.data.load import prepare
from lowvram_grpo.data.mixture import Mixture, Part, Source, mixed, read_mixture
from lowvram_grpo.errors import UserError
from lowvram_grpo.jobs.task import Rewards
from lowvram_grpo.jobs.training_data import prepared_data, read_evaluated, read_raw
from lowvram_grpo.recipe.resolve import Recipe
from lowvram_grpo.rewards.registry import resolve_reward


def part(name, rows, stream=False):
    data = Dataset.from_list(rows)
    return Part.of(name, data.to_iterable_dataset() if stream else data)


@pytest.mark.parametrize("stream", [False, True])
def test_parts_with_other_columns_become_one(stream):
    said = []
    one = mixed(
        [
            part("a", [{"prompt": f"a{i}", "answer": str(i), "id": i} for i in range(6)], stream),
            part("b", [{"prompt": [{"role": "user", "content": f"b{i}"}], "id": str(i)} for i in range(3)], stream),
        ],
        None,
        0,
        said.append,
    )
    rows = list(one.data)
    assert Counter(row["data_source"] for row in rows) == {"a": 6, "b": 3}
    assert {row["prompt"][0]["content"] for row in rows} == {*(f"a{i}" for i in range(6)), "b0", "b1", "b2"}
    assert all("id" not in row and (row["answer"] is None) == (row["data_source"] == "b") for row in rows)
    assert {*one.first.column_names} == {"prompt", "answer", "data_source"}
    assert "prompts of a become user turns" in said[0] and "column id differs in type" in said[1]


@pytest.mark.parametrize("stream", [False, True])
def test_weights_decide_how_often_a_part_comes(stream):
    parts = [part(name, [{"prompt": f"{name}{i}"} for i in range(40)], stream) for name in "ab"]
    rows = list(mixed(parts, [0.8, 0.2], 1, print).data)
    shares = Counter(row["data_source"] for row in rows)
    assert 0.7 < shares["a"] / len(rows) < 0.9 and {f"b{i}" for i in range(40)} < {row["prompt"] for row in rows}


def recipe(tmp_path, **settings):
    for name, rows in (
        ("a", [{"question": f"a{i}", "answer": str(i)} for i in range(20)]),
        ("b", [{"problem": f"b{i}", "solution": str(i), "extra": i} for i in range(10)]),
        ("c", [{"problem": "c"}]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Recipe(reward=["accuracy"], **settings)


def trained_on(recipe, said=None):
    tell = print if said is None else said.append
    rewards = Rewards(["accuracy"], [resolve_reward("accuracy", recipe)[0]], [1.0])
    raw = read_raw(recipe, tell)
    return prepared_data(recipe, raw, read_evaluated(recipe), rewards, tell)


@pytest.mark.parametrize("stream", [False, True])
def test_a_recipe_mixes_files(tmp_path, stream):
    places = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    train, evaluated = trained_on(recipe(tmp_path, data=places, stream=stream))
    assert evaluated is None and train.streams is stream
    assert sorted(row["prompt"] for row in train.data) == sorted(
        [f"a{i}" for i in range(20)] + [f"b{i}" for i in range(10)]
    )
    assert {row["data_source"] for row in train.data} == {"a", "b"}


def test_open_r1s_mixture_takes_shares_and_keeps_a_test_split(tmp_path):
    table = {
        "datasets": [
            {"id": f"{tmp_path}/a.jsonl", "config": None, "columns": ["question", "answer"], "weight": 0.5},
            {"id": f"{tmp_path}/b.jsonl", "split": "train"},
        ],
        "seed": 7,
        "test_split_size": 0.25,
    }  # fmt: skip
    train, kept = trained_on(recipe(tmp_path, dataset_mixture=table))
    assert len(train.data) == 15 and len(kept.data) == 5
    both = [*train.data, *kept.data]
    assert Counter(row["data_source"] for row in both) == {"a": 10, "b": 10} and len({r["prompt"] for r in both}) == 20
    again, _ = trained_on(recipe(tmp_path, dataset_mixture=table))
    assert again.data["prompt"][:] == train.data["prompt"][:] != sorted(train.data["prompt"][:])


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"data": ["a", "c"]}, "In c: the reward 'accuracy' needs a column"),
        ({"data": ["a", "b"], "data_weights": [1.0]}, "1 number for 2 datasets"),
        ({"data": ["a", "b"], "data_weights": [1.0, 0.0]}, "each must be above 0"),
        ({"data": "a", "data_weights": [1.0]}, "is for several datasets"),
        ({"data": ["a", "b"], "data_config": "main"}, "a configuration of one dataset"),
        ({"data": "a", "stream": True, "split": "train[:10%]"}, "can't be taken of a stream"),
        ({"data": "a", "stream": True, "split": "trian"}, "no split 'trian' .did you mean 'train'"),
        ({"data": "a", "stream": True, "split": "train[50:60]"}, "is empty"),
        ({"dataset_mixture": {"datasets": [{"id": "a", "weight": 0.5}]}, "stream": True}, "shares of rows"),
        ({"dataset_mixture": {"datasets": [{"id": "a"}]}, "eval_split": "test"}, "no other split to evaluate on"),
    ],
)
def test_what_does_not_fit_together_is_said(tmp_path, settings, words):
    here = lambda name: str(tmp_path / f"{name}.jsonl")
    if "data" in settings:
        data = settings["data"]
        settings = {**settings, "data": here(data) if isinstance(data, str) else [here(name) for name in data]}
    else:
        listed = [{**entry, "id": here(entry["id"])} for entry in settings["dataset_mixture"]["datasets"]]
        settings = {**settings, "dataset_mixture": {"datasets": listed}}
    with pytest.raises(UserError, match=words):
        trained_on(recipe(tmp_path, **settings))


@pytest.mark.parametrize(
    "table,words",
    [
        ({}, "needs a list `datasets`"),
        ({"datasets": [{"weight": 1}]}, "Dataset 1 of dataset_mixture has no `id`"),
        ({"datasets": [{"id": "a", "weigth": 1}]}, "no key 'weigth' .did you mean 'weight'"),
        ({"datasets": [{"id": "a", "weight": 1.5}]}, "weight of a .* is 1.5"),
        ({"datasets": [{"id": "a", "columns": ["x"]}, {"id": "b", "columns": ["y"]}]}, "take different columns"),
        ({"datasets": [{"id": "a"}], "test_split_size": 1.5}, "test_split_size"),
    ],
)
def test_a_mixture_that_is_none_is_said(table, words):
    with pytest.raises(UserError, match=words):
        read_mixture(table)


def test_a_mixture_is_read():
    table = {"datasets": [{"id": "a", "config": "x", "columns": ["p"], "weight": 0.5}], "seed": 3}
    assert read_mixture(table) == Mixture((Source("a", "x", None, ("p",), 0.5),), 3, None)


def test_rows_have_system_prompts_of_their_own():
    said = []
    rows = [{"prompt": "a", "system_prompt": "Mine."}, {"prompt": "b", "system_prompt": None}]
    arguments = {"template": None, "prompt_column": None, "answer_column": None, "few_shot": None, "tell": said.append}
    prompts = prepare(Dataset.from_list(rows), system_prompt="The run's.", **arguments)["prompt"][:]
    assert [prompt[0]["content"] for prompt in prompts] == ["Mine.", "The run's."]
    assert "column 'system_prompt' holds the system prompts of single rows" in said[0]
    alone = prepare(Dataset.from_list(rows), system_prompt=None, **arguments)["prompt"][:]
    assert [len(prompt) for prompt in alone] == [2, 1]
    assert prepare(Dataset.from_list(rows), system_prompt="", **arguments)["prompt"][:] == ["a", "b"]


def test_rows_have_arguments_for_the_chat_template():
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[0]['content'] }} {{ one }} {{ two }}"
    rows = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"one": "b", "other": None}},
            {"prompt": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"one": None, "other": "x"}},
        ]
    )
    own = row_kwargs(rows)
    assert own == [{"one": "b"}, {"other": "x"}]
    run = {"one": "c", "two": "d"}
    ids, _ = encode_prompts(tokenizer, rows["prompt"][:], max_prompt_length=None, chat_template_kwargs=run, own=own)
    assert [tokenizer.convert_ids_to_tokens(row) for row in ids] == [["a", "b", "d"], ["a", "c", "d"]]
    assert row_kwargs([{"prompt": "a"}]) is None
    assert row_kwargs([{"chat_template_kwargs": '{"one": 1}'}]) == [{"one": 1}]
    with pytest.raises(UserError, match="no table of arguments for the chat template"):
        row_kwargs([{"chat_template_kwargs": 3}])
