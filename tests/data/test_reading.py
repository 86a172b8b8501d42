"""Files as people have them: what a reader would shift, rename or decode wrongly is mended or named."""

from __future__ import annotations

import json
import os

import pytest

from lowvram_grpo.data.load import load
from lowvram_grpo.errors import UserError

ROWS = [{"prompt": "a, b?", "answer": "x"}, {"prompt": "好", "answer": "y"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(str(tmp_path / name)).to_list()


@pytest.mark.parametrize(
    "name,content",
    [
        ("rows.jsonl", LINES.encode("utf-8-sig")),
        ("rows.jsonl", LINES.encode("utf-16")),
        ("rows.jsonl", "\r\n" + LINES.replace("\n", "\r\n\r\n") + "\r\n"),
        ("rows.json", json.dumps(ROWS, ensure_ascii=False, indent=1).encode("utf-16")),
        ("rows.json", json.dumps({"prompt": ["a, b?", "好"], "answer": ["x", "y"]})),
        ("rows.json", json.dumps({"prompt": {"0": "a, b?", "1": "好"}, "answer": {"0": "x", "1": "y"}})),
        ("rows.json", json.dumps({"version": "1.0", "data": ROWS})),
        ("rows.csv", 'prompt;answer\r\n"a, b?";x\r\n好;y\r\n'),
        ("rows.csv", 'prompt\tanswer\n"a, b?"\tx\n好\ty\n'.encode("utf-16")),
        ("rows.csv", 'prompt,answer\n"a, b?",x,\n好,y,\n'),
        ("rows.tsv", 'prompt\tanswer\na, b?\tx\n好\ty\n'.encode("utf-8-sig")),
    ],
    ids=["mark", "utf-16", "blank lines", "array", "columns", "pandas", "under a key", "semicolons", "tabs", "ends",
         "tsv"],
)  # fmt: skip
def test_rows_come_out_however_they_were_written(tmp_path, name, content):
    assert read(tmp_path, name, content) == ROWS


def test_one_row_is_not_unfolded(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    for row in ({"messages": chat}, {"prompt": chat, "answer": ["1"]}, {"prompt": "a", "tags": ["b", "c"]}):
        assert read(tmp_path, "one.json", json.dumps(row)) == [row]


def test_words_that_pandas_takes_for_missing_are_answers(tmp_path):
    rows = read(tmp_path, "rows.csv", "prompt,answer\na,None\nb,NA\nc,\n")
    assert [row["answer"] for row in rows] == ["None", "NA", None]


GBK = '{"prompt": "0加1等于多少？", "answer": "1"}\n'


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("rows.jsonl", GBK.encode("gbk"), r"rows.jsonl is not UTF-8 text \(byte 0x.. in line 1\); save it as UTF-8"),
        ("rows.json", f"[\n{GBK}]".encode("gbk"), "not UTF-8 text .*line 2"),  # ujson reads it as other characters
        ("rows.csv", "prompt,answer\nété,1\n".encode("cp1252"), "not UTF-8 text .byte 0xe9 in line 2"),
        ("rows.jsonl", LINES.replace("}\n", "},\n"), "line 1 is no JSON .*without a comma behind it"),
        ("rows.jsonl", LINES.replace('"x"}', '"x",}'), "line 1 is no JSON .*one whole object a line"),
        ("rows.jsonl", '{"prompt": "a"}\n"b"\n', "line 2 is no object"),
        ("rows.json", '[{"prompt": "a"},]', "it is no JSON"),
        ("rows.csv", "prompt,answer,answer\na,1,2\n", "2 columns called 'answer'"),
        ("rows.csv", "prompt,answer\n", "is empty: it has no row"),
        ("rows.jsonl", "\n\n", "is empty"),
        ("rows.csv", "prompt,answer\na, b?,x\n", "3 fields in line 2, but 2 columns.*holds a comma into double quotes"),
    ],
)
def test_what_would_be_read_wrongly_is_named(tmp_path, name, content, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path, name, content)


def test_a_slice_of_a_split_that_is_not_there_names_one_that_is(tmp_path):
    (tmp_path / "rows.jsonl").write_text(LINES, encoding="utf-8")
    with pytest.raises(UserError, match=r"no split 'test'; it has train, as in 'train\[:4\]'\."):
        load(str(tmp_path / "rows.jsonl"), split="test[:4]")


def test_a_saved_split_keeps_its_name(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({name: Dataset.from_dict({"prompt": ["a"]}) for name in ("train", "test")}).save_to_disk(tmp_path / "d")
    assert str(load(str(tmp_path / "d"), prefer=("test", "train")).split) == "test"


def test_text_files_in_folders_are_looked_through_too(tmp_path):
    for name, content in (("a.jsonl", GBK.encode("gbk")), ("b.csv", b"prompt;answer\na;1\n")):
        folder = tmp_path / name[0]
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / ".hidden.csv").write_bytes(GBK.encode("gbk"))  # which `datasets` does not read either
    with pytest.raises(UserError, match=r"The file a.jsonl of the dataset .* is not UTF-8"):
        load(str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"The file b.csv of the dataset .* separated by other signs"):
        load(str(tmp_path / "b"))
    (tmp_path / "b" / "b.csv").write_text("prompt,answer\na,x\n", encoding="utf-8")
    assert load(str(tmp_path / "b")).to_list() == [{"prompt": "a", "answer": "x"}]


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="a place where no folder can be made")
def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_data(tmp_path, monkeypatch):
    for cache in ("/proc/none/datasets", str(tmp_path / "file" / "cache")):
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        with pytest.raises(UserError, match=f"The cache folder {cache} can't be written .*set HF_DATASETS_CACHE"):
            read(tmp_path, "rows.jsonl", LINES)


def test_a_full_disk_is_the_caches(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.load_dataset", full)
    with pytest.raises(UserError, match=r"can't be written \(No space left on device\)"):
        read(tmp_path, "rows.jsonl", LINES)
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: os.listdir(tmp_path / "file" / "rows"))
    with pytest.raises(UserError, match=r"The dataset .*rows.jsonl can't be read"):
        read(tmp_path, "rows.jsonl", LINES)
