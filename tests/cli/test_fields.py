"""--help-all says what parse_extra takes, for whatever fields this version of transformers has."""

from __future__ import annotations

import re
import sys
from dataclasses import fields

import pytest

from lowvram_grpo.cli import app
from lowvram_grpo.cli.flags import parse_extra
from lowvram_grpo.recipe.field_table import first_sentence, type_name
from lowvram_grpo.recipe.resolve import training_types
from lowvram_grpo.rewards.settings import RewardSettings

REWARDS = [field.name for field in fields(RewardSettings)]
EXAMPLES = {
    "INT": "3",
    "FLOAT": "0.5",
    "TEXT": "x",
    "LIST": "a,b",
    "JSON": '{"a": 1}',
    "TEXT|BOOL": "x",
    "INT|TEXT": "3",
}


@pytest.fixture
def printed(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["lowvram-grpo", "train", "--help-all"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_field_is_listed_once_with_type_default_and_help(printed):
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("  --"))
    entries = re.findall(r"^  --([\w-]+)( [A-Z|]+)? \[(.+)\]\n      (\S.+)$", printed, flags=re.MULTILINE)
    assert [name.replace("-", "_") for name, *_ in entries] and len(entries) == len({*training_types(), *REWARDS})
    assert {name.replace("-", "_") for name, *_ in entries} == {*training_types(), *REWARDS}
    for name, kind, _, _ in entries:  # and the flags are taken as they stand there
        assert parse_extra([f"--{name}", *([EXAMPLES[kind.strip()]] if kind else [])])
    assert ("num-generations", " INT", "8", "Completions per prompt (G).") in entries
    assert ("cold-start", " TEXT", "auto") in [entry[:3] for entry in entries]  # what the command line sets
    assert ("self-test", "", "on") in [entry[:3] for entry in entries]


def test_fields_without_effect_stand_apart(printed):
    inert = printed.split("without effect")[1]
    assert (
        "--vllm-group-port" in inert
        and "--use-vllm" not in inert
        and "--torch-compile [" in inert
        and "--beta" not in inert
    )
    assert "(no effect" not in printed


@pytest.mark.parametrize(
    "hint, name",
    [
        (int | None, "int"),
        (bool | None, "bool"),
        (list[str] | str | None, "list"),
        (dict[str, int] | str | None, "json"),
        (list[float], "list"),
        (object, "text"),
    ],
)
def test_type_name(hint, name):
    assert type_name(hint) == name


def test_first_sentence():
    assert first_sentence("Takes ~20%% more,\n e.g. this. Then that.") == "Takes ~20% more, e.g. this."


def test_help_names_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lowvram-grpo", "train", "--help"])
    with pytest.raises(SystemExit):
        app.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "--help-all lists them" in said
    assert "--memory-plan" in said  # what a run's lines on screen refer to, and no field of GRPOConfig
