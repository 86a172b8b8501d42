from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from lowvram_grpo.data.load import check_dataset, is_conversational, load, prepare
from lowvram_grpo.errors import UserError

ROWS = [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def prepared(rows, **given):
    options = dict.fromkeys(("template", "prompt_column", "answer_column", "system_prompt", "few_shot"))
    return prepare(rows if isinstance(rows, Dataset) else Dataset.from_list(rows), **{**options, **given})


def user(text):
    return {"role": "user", "content": text}


# Loading


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_load_reads_each_kind_of_file(tmp_path, suffix):
    file, data = tmp_path / f"rows.{suffix}", Dataset.from_list(ROWS)
    if suffix == "json":
        file.write_text(json.dumps(ROWS), encoding="utf-8")
    elif suffix == "jsonl":
        data.to_json(file)
    elif suffix == "parquet":
        data.to_parquet(file)
    else:
        data.to_csv(file, sep="\t" if suffix == "tsv" else ",", index=False)
    assert load(str(file)).to_list() == ROWS


def test_load_reads_saved_folders_and_folders_of_files(tmp_path):
    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([4])).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    data.to_json(tmp_path / "files" / "train.jsonl")
    data.select([2]).to_json(tmp_path / "files" / "test.jsonl")
    assert load(str(tmp_path / "one")).to_list() == ROWS
    assert load(str(tmp_path / "two")).to_list() == ROWS
    assert load(str(tmp_path / "two"), split="test").to_list() == ROWS[4:]
    assert load(str(tmp_path / "files"), split="test").to_list() == [ROWS[2]]


def test_load_takes_slices_and_sums_of_splits(tmp_path):
    data = Dataset.from_list(ROWS)
    DatasetDict(train=data, test=data.select([4])).save_to_disk(tmp_path / "two")
    assert load(str(tmp_path / "two"), split="train[1:3]+test").to_list() == [ROWS[1], ROWS[2], ROWS[4]]
    with pytest.raises(UserError, match=r"write it as train or train\[:1000\]"):
        load(str(tmp_path / "two"), split="train[1:")


def test_load_takes_the_only_split_and_asks_among_several(tmp_path):
    data = Dataset.from_list(ROWS)
    DatasetDict(validation=data).save_to_disk(tmp_path / "only")
    DatasetDict(validation=data, test=data).save_to_disk(tmp_path / "several")
    assert len(load(str(tmp_path / "only"))) == 5
    with pytest.raises(UserError, match="no split 'train'; choose one of validation, test"):
        load(str(tmp_path / "several"))
    with pytest.raises(UserError, match=r"'tst' \(did you mean 'test'\?\); it has validation, test"):
        load(str(tmp_path / "several"), split="tst")


def test_load_names_what_is_missing_or_unreadable(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data/rows\.jsonl does not exist"):
        load("data/rows.jsonl")
    with pytest.raises(UserError, match=r"C:\\rows does not exist"):
        load("C:\\rows")
    odd = tmp_path / "rows.xyz"
    odd.write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="no known kind; give a json, jsonl"):
        load(str(odd))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\nnot json\n', encoding="utf-8")
    with pytest.raises(UserError, match="can't be read: line 2 is no JSON"):
        load(str(broken))


def test_load_says_how_to_go_on_where_the_hub_fails(monkeypatch):
    def fails(error):
        def load_dataset(*args, **kwargs):
            raise error

        monkeypatch.setattr("datasets.load_dataset", load_dataset)

    fails(ConnectionError("Couldn't reach the Hub"))
    with pytest.raises(UserError, match=r"neither a file nor a folder here, nor reachable on the hub.*HF_ENDPOINT"):
        load("owner/name")
    fails(DatasetNotFoundError("Dataset 'owner/name' doesn't exist"))
    with pytest.raises(UserError, match=r"doesn't exist.*local path"):
        load("owner/name")
    fails(ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']"))
    with pytest.raises(UserError, match=r"'main', 'socratic'\]; choose one with --data-config\."):
        load("owner/name")


def test_load_refuses_empty_data(tmp_path):
    Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "none")
    (tmp_path / "zero.jsonl").write_text("", encoding="utf-8")
    for name in ("none", "zero.jsonl"):
        with pytest.raises(UserError, match=f"{name} is empty"):
            load(str(tmp_path / name))


# Preparing


def test_prepare_keeps_plain_prompts_and_all_columns():
    assert prepared([{"prompt": "a", "level": 3}]).to_list() == [{"prompt": "a", "level": 3}]


def test_prepare_finds_or_takes_the_prompt_column():
    row = {"text": "t", "problem": "q", "other": "o"}
    assert prepared([row])["prompt"][0] == "q"
    assert prepared([row], prompt_column="other").to_list() == [{**row, "prompt": "o"}]
    with pytest.raises(UserError, match="no prompt column; name one with --prompt-column: article, id"):
        prepared([{"article": "x", "id": 1}])
    with pytest.raises(UserError, match=r"'othr' \(did you mean 'other'\?\); choose --prompt-column from: text, pr"):
        prepared([row], prompt_column="othr")


def test_prepare_copies_the_answer_as_text():
    rows = [{"prompt": "a", "final": 18}, {"prompt": "b", "final": None}]
    assert prepared(rows, answer_column="final")["answer"][:] == ["18", None]
    with pytest.raises(UserError, match="no column 'gold'; choose --answer-column from: prompt, final"):
        prepared(rows, answer_column="gold")


@pytest.mark.parametrize("name", ["tldr", "tldr-zh"])
def test_tldr_makes_turns_an_answer_and_a_reference(name):
    data = prepared([{"prompt": "long text", "completion": "short"}], template=name)
    assert sorted(data.column_names) == ["answer", "prompt", "reference_completion"]
    row = data[0]
    assert [m["role"] for m in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert row["prompt"][-1] == user("long text")
    assert (row["answer"], row["reference_completion"]) == ("short", "<answer>short</answer>")


def test_a_completion_column_stays_where_it_is_not_the_answer():
    assert prepared([{"prompt": "a", "completion": "c"}]).column_names == ["prompt", "completion"]


def test_own_system_prompt_and_examples_replace_those_of_the_template():
    rows, shots = [{"prompt": "x"}], [{"prompt": "1", "completion": "2"}]
    data = prepared(rows, template="tldr", system_prompt="Mine.", few_shot=shots)
    assert data[0]["prompt"] == [
        {"role": "system", "content": "Mine."},
        user("1"),
        {"role": "assistant", "content": "2"},
        user("x"),
    ]
    assert prepared(rows, template="tldr", system_prompt="", few_shot=[])[0]["prompt"] == "x"


def test_r1_makes_references_only_where_there_is_reasoning():
    row = {"problem": "1+1?", "solution": "2"}
    assert "reference_completion" not in prepared([row], template="r1").column_names
    data = prepared([{**row, "reasoning": "add"}, {**row, "reasoning": ""}], template="r1")
    assert data["reference_completion"][:] == ["<think>\nadd\n</think>\n<answer>\n2\n</answer>", None]
    assert data["solution"][:] == data["answer"][:] == ["2", "2"]


def test_references_may_first_appear_far_down():
    rows = [{"prompt": "x", "completion": None}] * 1500 + [{"prompt": "x", "completion": "s"}]
    references = prepared(rows, template="tldr")["reference_completion"]
    assert references[0] is None and references[1500] == "<answer>s</answer>"


def test_references_of_the_data_win():
    row = {"prompt": "x", "answer": "s", "reference_completion": "mine"}
    assert prepared([row], template="tldr")[0]["reference_completion"] == "mine"


def test_conversations_get_a_system_turn_only_where_they_have_none():
    own = {"role": "system", "content": "Own."}
    rows = [{"prompt": [user("a")]}, {"prompt": [own, user("b")]}]
    data = prepared(rows, system_prompt="New.")
    assert data[0]["prompt"] == [{"role": "system", "content": "New."}, user("a")]
    assert data[1]["prompt"] == [own, user("b")]
    assert prepared(rows)["prompt"][:] == [[user("a")], [own, user("b")]]


def test_examples_go_before_single_turns_only():
    shots = [{"prompt": "1", "completion": "2"}]
    several = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    data = prepared([{"prompt": [user("a")]}, {"prompt": several}], few_shot=shots)
    assert [m["content"] for m in data[0]["prompt"]] == ["1", "2", "a"]
    assert data[1]["prompt"] == several


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", None], "Row 1 of column 'prompt' is empty"),
        (["a", "  "], "Row 1 of column 'prompt' is blank"),
        ([1, 2], "Row 0 of column 'prompt' is int"),
        ([[user("a")], []], "Row 1 of column 'prompt' is empty"),
        ([[user("a")], [user(None)]], "Row 1 .* a message whose role or content is not text"),
    ],
)
def test_unusable_prompts_are_named_by_row(prompts, message):
    with pytest.raises(UserError, match=message):
        prepared(Dataset.from_dict({"prompt": prompts}))


def test_text_and_conversations_do_not_mix(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p}) for p in ("a", [user("b")])), encoding="utf-8")
    with pytest.raises(UserError, match="Row 1 of column 'prompt' is a conversation, but row 0 is text"):
        prepared(load(str(file)))


def test_unknown_template():
    with pytest.raises(UserError, match="no template 'poem'"):
        prepared(ROWS, template="poem")


def test_is_conversational():
    assert is_conversational([user("a")])
    assert not any(map(is_conversational, ["a", [], ["a"], None]))


# Data as it is published: messages as text, in parts, in ShareGPT's form, with the answer as their last turn

CHATS = [[user(f"q{i}"), {"role": "assistant", "content": f"a{i}"}] for i in range(2)]


def told(rows, **given):
    said = []
    return prepared(rows, tell=said.append, **given), " ".join(said)


@pytest.mark.parametrize("write", [json.dumps, repr, lambda chat: " " + json.dumps(chat, indent=1)])
def test_messages_that_were_written_out_as_text_are_decoded(write):
    data, said = told([{"prompt": write([user("it's")])}, {"prompt": write([user("b")])}])
    assert data["prompt"][:] == [[user("it's")], [user("b")]]
    assert "column 'prompt' are written out as text" in said


def test_text_that_only_mentions_json_stays_text():
    rows = [{"prompt": text} for text in ('[{"x": 1}] is a list', '{"role": "user"}', "[1, 2]")]
    assert prepared(rows).to_list() == rows


@pytest.mark.parametrize("row", [0, 1])
def test_records_before_a_question_are_no_messages(row):
    texts = ["plain", '[{"content": "a", "id": 3}] Summarize this JSON.']
    data = prepared([{"prompt": text} for text in (texts if row else texts[::-1])])
    assert data[row]["prompt"] == texts[1]


def test_written_out_messages_that_cannot_be_decoded_are_named():
    numpy = "[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]"
    with pytest.raises(UserError, match="Row 0 of column 'prompt' looks like a list of messages, but is neither JSON"):
        prepared([{"prompt": numpy}])
    with pytest.raises(UserError, match="Row 1 of column 'prompt' is a conversation, but row 0 is text"):
        prepared([{"prompt": "a"}, {"prompt": json.dumps([user("b")])}])


def test_the_last_turn_of_sft_data_is_the_reference_and_no_part_of_the_prompt():
    data, said = told([{"messages": chat} for chat in CHATS])
    assert data["prompt"][:] == [[user("q0")], [user("q1")]]
    assert data["answer"][:] == data["reference_completion"][:] == ["a0", "a1"]
    assert "2 of 2 conversations in column 'messages' end with the assistant's turn" in said


@pytest.mark.parametrize("column", ["messages", "conversations", "dialogue"])
@pytest.mark.parametrize("write", [lambda chat: chat, json.dumps])
def test_no_reference_stays_in_a_prompt_whatever_the_column_is_called(column, write):
    several = [user("a"), {"role": "assistant", "content": "b"}, *CHATS[0]]
    data = prepared([{column: write(several)}, {column: write([user("open")])}], prompt_column=column)
    assert data["prompt"][:] == [several[:-1], [user("open")]]
    assert data["answer"][:] == ["a0", None]


def test_references_and_answers_of_the_data_outrank_the_last_turn():
    rows = [{"messages": CHATS[0], "answer": "18", "reference_completion": "mine"}]
    assert prepared(rows).to_list() == [{**rows[0], "prompt": [user("q0")]}]
    solved = prepared([{"messages": CHATS[0], "solution": "18"}])
    assert "answer" not in solved.column_names and solved["reference_completion"][0] == "a0"
    named = prepared([{"messages": CHATS[0], "final": 18}], answer_column="final")
    assert (named[0]["answer"], named[0]["reference_completion"]) == ("18", "a0")


def test_a_template_makes_its_own_reference_of_the_last_turn():
    row = prepared([{"messages": CHATS[0]}], template="tldr")[0]
    assert row["prompt"][-1] == user("q0") and row["prompt"][0]["role"] == "system"
    assert (row["answer"], row["reference_completion"]) == ("a0", "<answer>a0</answer>")


@pytest.mark.parametrize("column", ["prompt", "raw_prompt"])
def test_a_prefill_in_a_column_of_prompts_stays_and_is_said(column):
    prefill = [user("a"), {"role": "assistant", "content": "<think>"}]
    data, said = told([{column: prefill}, {column: [user("b")]}], prompt_column=column)
    assert data["prompt"][:] == [prefill, [user("b")]] and "answer" not in data.column_names
    assert "1 of 2 conversations" in said and "rename the column to messages" in said


def test_nothing_is_said_of_usual_data():
    assert told([{"prompt": "a", "answer": "1"}])[1] == told([{"messages": [user("a")]}])[1] == ""


def test_an_answer_without_a_question_is_named():
    with pytest.raises(UserError, match="Row 0 of column 'messages' has no user's turn before the assistant's last"):
        prepared([{"messages": [{"role": "system", "content": "s"}, CHATS[0][1]]}])


def test_sharegpt_conversations_are_read():
    turns = [{"from": who, "value": text} for who, text in (("system", "s"), ("human", "q"), ("gpt", "a"))]
    data = prepared([{"conversations": turns}])
    assert data[0]["prompt"] == [{"role": "system", "content": "s"}, user("q")] and data[0]["answer"] == "a"
    with pytest.raises(UserError, match="has a message from 'narrator', which is none of assistant, "):
        prepared([{"conversations": [{"from": "narrator", "value": "x"}]}])


def test_the_prompt_is_chosen_among_columns_and_said():
    data, said = told([{"messages": CHATS[0], "prompt": "p", "text": "t"}])
    assert data[0]["prompt"] == "p"
    assert said == "the prompts are column 'prompt', not 'messages' or 'text' (--prompt-column)."
    assert prepared([{"messages": CHATS[0], "text": "q0 a0"}])[0]["prompt"] == [user("q0")]


def test_dialogues_that_are_plain_text_are_no_prompts_by_themselves():
    rows = [{"conversation": "User: 1+1? Assistant: 2"}]
    with pytest.raises(UserError, match="no prompt column; name one with --prompt-column: conversation"):
        prepared(rows)
    assert prepared(rows, prompt_column="conversation")["prompt"][:] == [rows[0]["conversation"]]


def test_text_parts_are_text_and_other_parts_are_named():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]
    assert prepared([{"prompt": [user(parts)]}])[0]["prompt"] == [user("What is 1+1?")]
    assert prepared([{"prompt": json.dumps([user(parts)])}])[0]["prompt"] == [user("What is 1+1?")]
    image = {"type": "image_url", "text": None}
    with pytest.raises(UserError, match=r"Row 0 .* has a message with a part of type 'image_url'; only text"):
        prepared([{"prompt": [user([*parts, image])]}])
    with pytest.raises(UserError, match=r"Row 0 .* has a message with a part of type 'image'"):
        prepared([{"prompt": json.dumps([user([{"type": "image"}])])}])


def test_an_answer_in_a_struct_is_taken_out_and_said():
    rows = [{"prompt": "a", "extra": {"ground_truth": str(i), "index": 100 + i}} for i in range(3)]
    data, said = told(rows, answer_column="extra")
    assert data["answer"][:] == ["0", "1", "2"] and "--answer-column extra.ground_truth" in said
    assert prepared(rows, answer_column="extra.index")["answer"][:] == ["100", "101", "102"]


def test_a_completion_of_messages_is_tldrs_answer():
    row = {"prompt": [user("long")], "completion": [{"role": "assistant", "content": "short"}]}
    assert prepared([row], template="tldr")[0]["reference_completion"] == "<answer>short</answer>"


@pytest.mark.parametrize("rewards,answer", [(["accuracy"], "7"), (["r.py:f"], {"ground_truth": "7", "index": 107})])
def test_built_in_rewards_get_the_answer_and_own_ones_the_column(rewards, answer):
    from lowvram_grpo.jobs.task import prepared as prepared_by
    from lowvram_grpo.recipe.resolve import Recipe

    data = Dataset.from_list([{"prompt": "a", "answer": {"ground_truth": "7", "index": 107}}])
    assert prepared_by(Recipe(reward=rewards), data)[0]["answer"] == answer


# What a script passes to the trainer


def test_the_trainer_names_what_is_no_dataset_of_prompts():
    import pandas

    data = Dataset.from_list([{"prompt": "a"}])
    assert not any(check_dataset(good, "train_dataset") for good in (data, data.to_list()))
    check_dataset({"a": data, "b": data}, "eval_dataset", several=True)
    for bad, words in [
        (DatasetDict(train=data, test=data), r"is a DatasetDict of several datasets .train, test.; .*data\['train'\]"),
        ({"validation": data}, r"is a dict of several datasets \(validation\)"),
        (pandas.DataFrame({"prompt": ["a"]}), "is a DataFrame, whose rows are not dicts"),
        ([{"prompt": 7}], "has a prompt that is int in its first row"),
        ([{"prompt": json.dumps([user("a")])}], "holds messages that are written out as text in its `prompt` column"),
        ((row for row in data), "must be a `Dataset` or `IterableDataset`, and is a generator; .*from_generator"),
        (data.to_iterable_dataset().take(0), "is empty"),
        ([{"prompt": "a", "images": [b"png"]}], "has pictures in its `images` column"),
    ]:
        with pytest.raises(UserError, match=f"train_dataset`?.* {words}"):
            check_dataset(bad, "train_dataset")
    stream = data.rename_column("prompt", "text").to_iterable_dataset()
    with pytest.raises(UserError, match=r"eval_dataset\['b'\] has no `prompt` column"):
        check_dataset({"a": data.to_iterable_dataset(), "b": stream}, "eval_dataset", several=True)
