from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards.registry import BUILTIN, TEMPLATE_REWARDS, parse_spec, resolve_reward

SOURCE = """
from helper_beside import base

def short(completions, **kwargs):
    return [base() for _ in completions]

async def judged(completions, **kwargs):
    return [2.0 for _ in completions]

def _hidden():
    pass

LIMIT = 3
"""


@pytest.fixture
def reward_file(tmp_path):
    (tmp_path / "helper_beside.py").write_text("def base():\n    return 1.0\n", encoding="utf-8")
    file = tmp_path / "my_rewards.py"
    file.write_text(SOURCE, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("label", ("label", None, 1.0)),
        ("label:0.5", ("label", None, 0.5)),
        ("label:-1e-2", ("label", None, -0.01)),
        ("a/b.py:f", ("a/b.py", "f", 1.0)),
        ("a/b.py:f:2", ("a/b.py", "f", 2.0)),
        (r"C:\rewards\b.py:f:0.5", (r"C:\rewards\b.py", "f", 0.5)),
        ("C:/rewards/b.py:f", ("C:/rewards/b.py", "f", 1.0)),
        (r"D:\models\judge", (r"D:\models\judge", None, 1.0)),
        (r"D:\models\judge:3", (r"D:\models\judge", None, 3.0)),
        ("pkg.mod:f:.5", ("pkg.mod", "f", 0.5)),
        ("org/model:0.1", ("org/model", None, 0.1)),
        ("mod:inf", ("mod", "inf", 1.0)),
        ("http://localhost:8000", ("http://localhost:8000", None, 1.0)),
        ("http://localhost:8000:2", ("http://localhost:8000", None, 2.0)),
        ("http://localhost:8000/score:0.5", ("http://localhost:8000/score", None, 0.5)),
        ("HTTPS://a.b/score?k=c:d#batch=4:-1", ("HTTPS://a.b/score?k=c:d#batch=4", None, -1.0)),
        ("http://[::1]:8000/score", ("http://[::1]:8000/score", None, 1.0)),
        ("http://[::1]", ("http://[::1]", None, 1.0)),
    ],
)
def test_parse_spec(spec, parts):
    assert parse_spec(spec) == parts


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin(name):
    assert resolve_reward(f"{name}:0.25") == (BUILTIN[name], 0.25)


def test_templates_name_builtins():
    assert {name for names in TEMPLATE_REWARDS.values() for name in names} <= set(BUILTIN)


def test_file(reward_file):
    short, weight = resolve_reward(f"{reward_file}:short:0.5")
    assert (short(completions=["a", "b"]), weight) == ([1.0, 1.0], 0.5)
    judged, _ = resolve_reward(f"{reward_file}:judged")
    assert judged.__module__ == short.__module__, "one file is loaded once"


def test_a_changed_file_is_loaded_again(tmp_path):
    file = tmp_path / "edited.py"
    for second, value in enumerate(("1.0", "2.0")):
        file.write_text(f"def f(completions, **kwargs):\n    return [{value} for _ in completions]\n", encoding="utf-8")
        os.utime(file, (second, second))
        assert resolve_reward(f"{file}:f")[0](completions=["a"]) == [float(value)]


def test_module(reward_file, monkeypatch):
    monkeypatch.chdir(reward_file.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(reward_file.parent)])
    judged, weight = resolve_reward("my_rewards:judged:3")
    assert (judged.__name__, weight) == ("judged", 3.0)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("trl.rewards.think_format_reward", "think_format"),
        ("trl.rewards:accuracy_reward:2", "accuracy_reward"),
        ("trl.rewards.accuracy_rewards.reasoning_accuracy_reward", "reasoning_accuracy"),
        ("open_r1.rewards.tag_count_reward:0.5", "tag_count"),
    ],
)
def test_originals_that_are_not_installed_are_built_in(monkeypatch, spec, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_reward(spec)[0] is BUILTIN[name]
    with pytest.raises(UserError, match="does not import"):
        resolve_reward("open_r1.rewards.none_of_ours")


def test_an_original_that_is_installed_is_taken(tmp_path, monkeypatch):
    folder = tmp_path / "open_r1"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "rewards.py").write_text("def tag_count_reward(completions): return []", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert resolve_reward("open_r1.rewards.tag_count_reward")[0].__module__ == "open_r1.rewards"
    finally:
        for name in ("open_r1", "open_r1.rewards"):
            sys.modules.pop(name, None)


def test_models(tmp_path):
    assert resolve_reward("some-org/some-model:2") == ("some-org/some-model", 2.0)
    assert resolve_reward(str(tmp_path)) == (str(tmp_path), 1.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", r"unknown reward 'acuracy' \(did you mean 'accuracy'\?\); built-in: label, label_strict"),
        ("my.py:f:heavy", r"the weight of the reward 'my.py:f:heavy' is not a number; write e.g. my.py:f:0.5"),
        ("label:0,5", r"weight '0,5' of the reward 'label' is not a number"),
        ("nowhere.py:f", r"'nowhere.py' does not exist \(looked for .*nowhere.py\)"),
        ("no_such_module_here:f", r"module 'no_such_module_here' does not import: ModuleNotFoundError"),
        ("./no/such/folder", r"folder './no/such/folder' does not exist"),
        ("math:no_such", r"'math' has no function 'no_such'"),
        ("a b:c", r"'a b:c' is none of NAME"),
    ],
)
def test_nothing_there(spec, message):
    with pytest.raises(UserError, match=message):
        resolve_reward(spec)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (":shrt", r"no function 'shrt' \(did you mean 'short'\?\); functions found: judged, short\."),
        (":LIMIT", r"no function 'LIMIT'.*functions found: judged, short\."),
        ("", r"needs a function: write .*my_rewards.py:NAME \(functions found: judged, short\)"),
    ],
)
def test_function_missing_in_a_file(reward_file, tail, message):
    with pytest.raises(UserError, match=message):
        resolve_reward(f"{reward_file}{tail}")


def test_a_file_that_does_not_import(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_thing\n", encoding="utf-8")
    with pytest.raises(UserError, match="does not import: ModuleNotFoundError: No module named 'no_such_thing'"):
        resolve_reward(f"{file}:f")


def test_the_registry_loads_nothing_heavy():
    code = (
        "import sys, lowvram_grpo.rewards.registry as r; r.resolve_reward('accuracy');"
        "print({'torch', 'sympy', 'transformers', 'math_verify'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
