"""Text files with and without a byte order mark, in UTF-8 and UTF-16; anything else is named by its line."""

from __future__ import annotations

import pytest

from lowvram_grpo.data import textfile
from lowvram_grpo.data.few_shot import few_shot
from lowvram_grpo.data.templates import chat_template
from lowvram_grpo.data.textfile import as_utf8, read_text
from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.registry import resolve_reward

WINDOWS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with a mark"]
GBK = "好吗？\n".encode("gbk")


def written(path, text, encoding):
    mark = "\ufeff" if encoding.endswith("with a mark") else ""
    path.write_bytes((mark + text).encode(encoding.split()[0]))
    return path


@pytest.mark.parametrize("encoding", [*WINDOWS, "utf-32"])
def test_what_windows_writes_is_read_without_mark_and_carriage_returns(tmp_path, encoding):
    assert read_text(written(tmp_path / "f", "é 好\r\nb\rc", encoding), "It") == "é 好\nb\nc"


def test_other_encodings_are_named_by_line_and_byte(tmp_path):
    (tmp_path / "f").write_bytes(b"a\nb\n" + GBK)
    with pytest.raises(UserError, match=r"^It is not UTF-8 text \(byte 0xba in line 3\); save it as UTF-8"):
        read_text(tmp_path / "f", "It")
    with pytest.raises(UserError, match=r"^It cannot be read: No such file"):
        read_text(tmp_path / "nowhere", "It")


def test_a_large_file_is_looked_through_in_blocks(tmp_path, monkeypatch):
    """A character that two blocks share is none of the wrong ones, and lines are counted across blocks."""
    monkeypatch.setattr(textfile, "_BLOCK", 4)
    good = written(tmp_path / "good", "abc好\n" * 5, "utf-8")
    with as_utf8(good, "It") as same:
        assert same == good
    (tmp_path / "bad").write_bytes(good.read_bytes() + "abc好".encode() + GBK)
    with pytest.raises(UserError, match="byte 0xba in line 6"), as_utf8(tmp_path / "bad", "It"):
        pass
    with as_utf8(written(tmp_path / "wide.csv", "好\r\n🎉", "utf-16"), "It") as copy:
        assert copy.suffix == ".csv" and copy.read_bytes() == "好\r\n🎉".encode()
    assert not copy.exists()


@pytest.mark.parametrize("encoding", WINDOWS)
def test_few_shot_files_chat_templates_and_rewards_from_windows(tmp_path, encoding):
    shots = written(tmp_path / "shots.json", '[{"prompt": "2+2?", "completion": "4"}]', encoding)
    assert few_shot(str(shots)) == [{"prompt": "2+2?", "completion": "4"}]
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    assert chat_template(str(written(tmp_path / "t.jinja", source, encoding))) == source
    code = "def f(completions, **columns):\n    return [float('好' in c) for c in completions]\n"
    function, _ = resolve_reward(f"{written(tmp_path / f'r{encoding[-3:].strip()}.py', code, encoding)}:f")
    assert function(["好", "a"]) == [1.0, 0.0]


def test_a_reward_file_may_declare_its_encoding(tmp_path):
    (tmp_path / "declared.py").write_bytes(
        b"# -*- coding: gbk -*-\nword = '" + GBK.strip() + b"'\ndef f(): return word\n"
    )
    assert resolve_reward(f"{tmp_path / 'declared.py'}:f")[0]() == "好吗？"


def test_few_shot_lines_and_what_is_wrong_with_them(tmp_path):
    file = tmp_path / "shots.jsonl"
    file.write_text('\n{"prompt": "a\u2028b", "completion": "4"}\n\n', encoding="utf-8")
    assert few_shot(str(file)) == [{"prompt": "a\u2028b", "completion": "4"}]
    for text, words in [("[{]", "not a readable json list"), ('[{"prompt": "a", "completion": 4}]', "both of text")]:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=words):
            few_shot(str(file))
