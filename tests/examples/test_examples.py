"""Everything in examples/ runs top to bottom, with a tiny model and a few rows in the place of the usual ones."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, make_model
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from chat_tokenizer import chat_tokenizer

from lowvram_grpo.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = ("tldr.ipynb", "tldr-zh.ipynb")
STEPS = 2
# What the rewards of the examples look for is often among what a model of so few words says by chance.
WORDS = ["<pad>", "<eos>", "<unk>", "<answer>", "</answer>", "$1003$", "a", "b", "c"]


def talker():
    """A tokenizer of WORDS, each between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model, whose name the examples find in their environment."""
    monkeypatch.chdir(tmp_path)
    make_model(max_position_embeddings=1024, vocab_size=len(WORDS)).save_pretrained(tmp_path / "model")
    talker().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("EXAMPLE_MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("EXAMPLE_STEPS", str(STEPS))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    return tmp_path


def rows_of(place, monkeypatch, rows):
    """A dataset of these rows, in the place of the usual one."""
    (place / "data").mkdir()
    (place / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setenv("EXAMPLE_DATA", str(place / "data"))
    return place / "data"


@pytest.fixture
def posts(place, monkeypatch):
    rows = [{"prompt": f"{c} b c {c} d e", "completion": f"{c} is all that matters"} for c in "fghijklmno"]
    return rows_of(place, monkeypatch, rows)


def moved(folder):
    """Whether an adapter has learned anything: B begins at zero."""
    weights = load_file(folder / "adapter_model.safetensors")
    return any(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)


def logged(trainer):
    return [row["step"] for row in trainer.state.log_history if "reward" in row and "loss" in row]


def test_the_tldr_script(place, posts):
    found = runpy.run_path(str(EXAMPLES / "tldr.py"), run_name="__main__")
    assert logged(found["trainer"]) == [1, 2] and moved(place / "tldr-grpo" / "adapter")
    assert found["near_fifty_characters"](["x" * 50, "x" * 25, ""]) == [0.0, -0.5, -1.0]


def test_gsm8k_with_r1_prompts(place, monkeypatch):
    rows = [{"question": f"how many {c} are 1 and 2", "answer": "1 + 2 = 3\n#### 1,003"} for c in "abcdefgh"]
    rows_of(place, monkeypatch, rows)
    found = runpy.run_path(str(EXAMPLES / "gsm8k_r1.py"), run_name="__main__")
    assert moved(place / "gsm8k-r1" / "adapter")
    row = found["as_conversation"](rows[0])
    assert row["solution"] == "$1003$" and [message["role"] for message in row["prompt"]] == ["system", "user"]
    reply = [{"content": "<think>\n1000 + 3\n</think>\n<answer>\n\\boxed{1003}\n</answer>"}]
    assert found["accuracy_reward"]([reply], solution=[row["solution"]]) == [1.0]
    assert found["format_reward"]([reply]) == [1.0]


def test_custom_rewards_in_a_script(place, posts):
    found = runpy.run_path(str(EXAMPLES / "custom_reward.py"), run_name="__main__")
    assert moved(place / "custom-reward" / "adapter")
    ids = [[1] * 16, [1] * 48, [1] * 80, []]
    assert found["brevity"](["a", "b", "c", " "], completion_ids=ids) == [1.0, 0.5, 0.0, 0.0]
    logs = {}
    scores = found["own_words"](["a b"] * 3, ["a c", "", "c d"], log_metric=logs.__setitem__)
    assert scores == [0.5, None, 1.0] and logs == {"replies_without_words": pytest.approx(1 / 3)}


def test_custom_rewards_on_the_command_line(place, posts, monkeypatch, capsys):
    file = EXAMPLES / "custom_reward.py"
    line = f"train --model {place}/model --data {posts} --reward {file}:brevity --reward {file}:own_words:0.5"
    more = "--max-steps 1 --plain --num-generations 4 -o run"
    monkeypatch.setattr(sys, "argv", ["lowvram-grpo", *line.split(), *more.split()])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 0, capsys.readouterr().err
    row = json.loads((place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert {"rewards/brevity/mean", "rewards/own_words/mean", "replies_without_words"} <= row.keys()


def cells(name, kind):
    book = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    return [cell for cell in book["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_top_to_bottom(name, place, posts, capsys):
    found = {"__name__": "__main__"}
    for index, cell in enumerate(cells(name, "code")):
        exec(compile("".join(cell["source"]), f"{name}, cell {index}", "exec"), found)
    assert logged(found["trainer"]) == [1, 2] and moved(place / "tldr-grpo" / "adapter")
    assert "adapter_model.safetensors" in capsys.readouterr().out
    best = [[{"content": "<answer>short</answer>"}]]
    rewards = [found[reward](best, answer=["a longer text"]) for reward in ("label", "label_strict", "content")]
    assert rewards == [[5.0], [10.0], [5.0]]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_clean(name):
    book = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and book["metadata"].keys() == {
        "kernelspec", "language_info",
    }  # fmt: skip
    ids = [cell["id"] for cell in book["cells"]]
    assert len(ids) == len(set(ids))
    for cell in book["cells"]:
        code = cell["cell_type"] == "code"
        assert cell.keys() == {
            "cell_type",
            "id",
            "metadata",
            "source",
            *(["execution_count", "outputs"] if code else []),
        }
        assert not code or (cell["outputs"] == [] and cell["execution_count"] is None)
        assert cell["source"] and all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")


def test_both_notebooks_do_the_same():
    """But for what is said to people and to the model."""
    trees = []
    for name in NOTEBOOKS:
        tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells(name, "code")))
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if " " in text or not text.isascii():
                node.value = ""
        trees.append(ast.dump(tree))
    assert trees[0] == trees[1]


def test_the_calculator(place):
    # With a template that knows of tools.
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(place / "model")
    make_model(max_position_embeddings=2048, vocab_size=len(tokenizer)).save_pretrained(place / "model")
    found = runpy.run_path(str(EXAMPLES / "calculator_tool.py"), run_name="__main__")
    assert (place / "calculator" / "adapter").is_dir()
    assert found["calculate"]("(17 + 25) * 3") == "126"


def test_what_the_calculator_says():
    found = runpy.run_path(str(EXAMPLES / "calculator_tool.py"))
    assert found["calculate"]("(17 + 25) * -3 / 4") == "-31.5" and found["calculate"]("9999 * 9999") == "99980001"
    with pytest.raises(ValueError, match="only numbers"):
        found["calculate"]("__import__('os')")
    row = next(found["sums"](1))
    spoken = [{"role": "assistant", "content": f"It is {int(row['answer']):,}"}]
    assert found["right_number"]([spoken, [{"content": "12"}], [{"content": None}]], answer=[row["answer"]] * 3) == [
        1,
        0,
        0,
    ]
