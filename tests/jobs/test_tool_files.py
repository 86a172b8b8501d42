"""What stands behind --tools and --environment, and a run from the command line with both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lowvram_grpo import UserError
from lowvram_grpo.cli.train import start
from lowvram_grpo.jobs.tool_files import acting_of
from lowvram_grpo.recipe.resolve import resolve

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from chatting import chat_tokenizer, small_model

SOURCE = '''
def double(a: int) -> int:
    """Doubles.

    Args:
        a: A number.
    """
    return 2 * a


def bare(a):
    return a


class Counter:
    def reset(self, **row):
        self.count = 0

    def add(self, step: int) -> int:
        """Adds.

        Args:
            step: How much.
        """
        self.count += step
        return self.count

    def get_reward(self):
        return float(self.count)


class Other:
    def reset(self, **row):
        pass
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    return str(path)


def acting(**settings):
    return acting_of(resolve({"model": "x", "data": "y", **settings}))


def test_functions_and_classes_by_name(file, tmp_path, monkeypatch):
    found = acting(tools=[f"{file}:double"], environment=f"{file}:Counter")
    assert [tool.__name__ for tool in found.tools] == ["double"] and found.judges
    assert [tool.__name__ for tool in found.agents.all_tools] == ["double", "add"]
    assert acting().agents is None
    (tmp_path / "one.py").write_text(SOURCE.replace("class Other", "class _Other").replace("def bare", "def _bare"))
    monkeypatch.chdir(tmp_path)
    recipe = resolve({"model": "x", "data": "y", "tools": ["one.py"], "environment": "one.py"})
    assert recipe.tools == [str(tmp_path / "one.py")]  # so that it goes on from any folder
    found = acting_of(recipe)
    assert [tool.__name__ for tool in found.tools] == ["double"] and found.environment.__name__ == "Counter"


@pytest.mark.parametrize("settings, why", [
    ({"tools": ["{}"]}, "'bare' can't be described .* If it is none, name those that are: .*:bare,double"),
    ({"tools": ["{}:duoble"]}, "has no function 'duoble' .did you mean 'double'"),
    ({"tools": ["gone.py"]}, "the tool file 'gone.py' does not exist"),
    ({"tools": ["package.module"]}, "is no Python file; write path/to/file.py"),
    ({"environment": "{}"}, "defines 2 classes with a method `reset` .Counter, Other.; write .*:NAME"),
    ({"environment": "{}:Gone"}, "has no class 'Gone'"),
    ({"environment": "{}:Counter,Other"}, "takes one class"),
])  # fmt: skip
def test_what_is_not_there(file, settings, why):
    fill = lambda value: [v.format(file) for v in value] if isinstance(value, list) else value.format(file)
    with pytest.raises(UserError, match=why):
        acting(**{name: fill(value) for name, value in settings.items()})


def test_a_run_by_flags(file, tmp_path, capsys):
    tokenizer, folder = chat_tokenizer(), tmp_path / "model"
    small_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": [{"role": "user", "content": f"{i}?"}]}) for i in range(4)))
    flags = {
        "model": str(folder), "data": [str(data)], "tools": [f"{file}:double"], "environment": f"{file}:Counter",
        "output_dir": tmp_path / "run", "plain": True,
    }  # fmt: skip
    extra = ["--max-steps", "1", "--num-generations", "2", "--prompts-per-step", "1", "--max-completion-length", "6",
             "--use-cpu", "true"]  # fmt: skip
    start(flags, extra, config=None, resume=None, dry_run=True)
    shown = capsys.readouterr().out
    assert "tools: double, add" in shown and "rewards: those of the environment" in shown
    assert '"name": "double"' in shown.partition("first prompt")[2]
    start(flags, extra, config=None, resume=None, dry_run=False)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["tools/call_frequency"] == 0 and row["rewards/Counter/mean"] == 0
    flags["data"] = [str(tmp_path / "plain.jsonl")]
    Path(flags["data"][0]).write_text('{"prompt": "plain"}')
    with pytest.raises(UserError, match="need prompts that are conversations"):
        start(flags, extra, config=None, resume=None, dry_run=True)
