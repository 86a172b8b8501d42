"""Tasks of reasoning-gym by name: the library itself where it is installed, else a small one in its place."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass, field
from random import Random
from types import ModuleType

import pytest

from lowvram_grpo.data import gym_tasks
from lowvram_grpo.data.gym_tasks import ENTRY_COLUMN, is_gym
from lowvram_grpo.data.reading import load
from lowvram_grpo.errors import UserError
from lowvram_grpo.jobs.task import guess_notice, prepared, rewards_of
from lowvram_grpo.recipe.resolve import resolve
from lowvram_grpo.rewards.registry import BUILTIN, resolve_reward
from lowvram_grpo.rewards.signatures import check_columns

INSTALLED = importlib.util.find_spec("reasoning_gym") is not None


@dataclass
class SumConfig:
    min_terms: int = 2
    max_terms: int = 6
    size: int = 500
    seed: int | None = None

    def validate(self):
        assert self.min_terms <= self.max_terms, "max_terms must be >= min_terms"


@dataclass
class Spec:
    name: str
    weight: float
    config: dict


@dataclass
class MixtureConfig:
    size: int = 500
    seed: int | None = None
    datasets: list = field(default_factory=list)


class Sums:
    def __init__(self, config):
        config.validate()
        self.config = config

    def __len__(self):
        return self.config.size

    def __getitem__(self, index):
        draw = Random(self.config.seed + index)
        terms = [draw.randint(1, 99) for _ in range(draw.randint(self.config.min_terms, self.config.max_terms))]
        question = f"State the final answer to the following arithmetic problem: {' + '.join(map(str, terms))} ="
        return {"question": question, "answer": str(sum(terms)), "metadata": {"source_dataset": "chain_sum"}}

    def score_answer(self, answer, entry):
        oracle = entry["answer"]
        if answer == oracle:
            return 1.0
        return len(oracle) / len(answer) if answer and oracle in answer else 0.0


def stand_in():
    """The names of reasoning-gym that are used here."""
    registered = {"chain_sum": (Sums, SumConfig), "leg_counting": (Sums, SumConfig)}

    def create_dataset(name, **settings):
        if name != "composite":
            return registered[name][0](registered[name][1](**settings))
        parts = settings.pop("datasets")
        made = [create_dataset(p.name, seed=settings["seed"] + i + 1, size=settings["size"], **p.config)
                for i, p in enumerate(parts)]  # fmt: skip

        class Mixture(Sums):
            def __init__(self):
                self.config = MixtureConfig(**settings)

            def __getitem__(self, index):
                chosen = Random(settings["seed"] + index).choices(range(len(parts)), [p.weight for p in parts])[0]
                entry = made[chosen][index]
                return {**entry, "metadata": {"source_dataset": parts[chosen].name}}

        return Mixture()

    def extract_answer(completion):
        found = re.findall(r"<answer>\s?(.*?)\s?</answer>", completion, re.DOTALL)
        return found[-1].strip() if found else None

    names = {
        "factory": {"DATASETS": {**registered, "composite": (Sums, MixtureConfig)}, "create_dataset": create_dataset},
        "composite": {"DatasetSpec": Spec},
        "utils": {"extract_answer": extract_answer},
    }
    modules = {"reasoning_gym": ModuleType("reasoning_gym")}
    for part, content in names.items():
        modules[f"reasoning_gym.{part}"] = module = ModuleType(f"reasoning_gym.{part}")
        vars(module).update(content)
    return modules


@pytest.fixture(autouse=True)
def gym(monkeypatch):
    if not INSTALLED:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    for cached in (gym_tasks.tasks_of, gym_tasks.entry_of):
        cached.cache_clear()


def score(data, replies):
    reward = BUILTIN["reasoning_gym"]
    return reward(completions=replies, **{name: data[: len(replies)][name] for name in data.column_names})


def test_a_task_and_its_settings():
    data = load("reasoning-gym:chain_sum?min_terms=2&max_terms=3&size=20&seed=4")
    assert len(data) == 20 and {"question", "answer", ENTRY_COLUMN} <= {*data.column_names}
    for row in data:
        numbers = re.search(r"problem: (.*) =", row["question"])[1]
        assert 2 <= len(re.findall(r"\d+", numbers)) <= 3
        assert eval(numbers) == int(row["answer"])
    again = load("reasoning-gym:chain_sum?min_terms=2&max_terms=3&size=20&seed=4")
    assert again[:] == data[:]
    assert load("reasoning-gym:chain_sum?size=20&seed=5")["question"] != data["question"]
    usual, seeded = (load(f"reasoning-gym:chain_sum?{query}") for query in ("size=3", "size=3&seed=0"))
    assert usual["question"][:] == seeded["question"][:]


def test_replies_get_the_tasks_own_scores():
    data = load("reasoning-gym:chain_sum?size=5")
    right = [f"<think>5</think> <answer>1</answer> <answer> {a} </answer>" for a in data["answer"]]
    assert score(data, right) == [1.0] * 5
    replies = ["no tags", "<answer></answer>", f"<answer>It is {data[2]['answer']}</answer>"]
    none, empty, part = score(data, replies)
    assert none == empty == 0 and 0 < part < 1
    chat = [[{"role": "assistant", "content": text}] for text in right]
    assert score(data, chat) == [1.0] * 5
    assert resolve_reward("reasoning_gym:0.5") == (BUILTIN["reasoning_gym"], 0.5)


def test_a_mixture_by_weight():
    data = load("reasoning-gym:chain_sum?weight=3&max_terms=3+leg_counting?size=60&seed=1")
    counts = {name: list(data["task"]).count(name) for name in ("chain_sum", "leg_counting")}
    assert sum(counts.values()) == len(data) == 60 and 30 <= counts["chain_sum"] <= 57
    assert score(data, [f"<answer>{a}</answer>" for a in data["answer"]]) == [1.0] * 60


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chain_sums", r"no task 'chain_sums' \(did you mean 'chain_sum'\?\)"),
        ("composite", "no task 'composite'"),
        ("chain_sum?min_term=2", r"chain_sum .*no setting 'min_term' \(did you mean 'min_terms'\?\); it has "),
        ("chain_sum?min_terms", "write settings as name=value"),
        ("chain_sum?min_terms=5&max_terms=2", r"the settings do not fit \(max_terms must be"),
        ("chain_sum?size=0", "size is 0; it must be a whole number from 1 on"),
        ("chain_sum?size=5+leg_counting?size=4", "size is that of the whole mixture; write it once"),
        ("chain_sum?weight=0+leg_counting", "the weight of chain_sum is 0"),
    ],
)
def test_what_is_not_there_is_named(spec, message):
    with pytest.raises(UserError, match=message):
        load(f"reasoning-gym:{spec}")


def test_it_says_how_to_install_it(monkeypatch):
    for part in ("factory", "composite"):
        monkeypatch.setitem(sys.modules, f"reasoning_gym.{part}", None)
    with pytest.raises(UserError, match="install it with `pip install reasoning-gym`"):
        load("reasoning-gym:chain_sum")


def test_its_scorer_is_the_reward_unless_another_is_named():
    assert is_gym("reasoning-gym:chain_sum") and not is_gym("org/reasoning-gym") and not is_gym(None)
    recipe = resolve({"model": "m", "data": "reasoning-gym:chain_sum?size=4"})
    raw = load(recipe.data)
    assert rewards_of(recipe, raw.column_names).specs == ["reasoning_gym"] and recipe.template == "r1"
    assert "scored by its own scorers" in guess_notice(recipe)
    data = prepared(recipe, raw)
    assert data[0]["prompt"][0]["role"] == "system" and "<answer>" in data[0]["prompt"][0]["content"]
    assert score(data, [f"<answer>{a}</answer>" for a in raw["answer"]]) == [1.0] * 4
    other = resolve({"model": "m", "data": recipe.data, "reward": ["accuracy"]})
    assert rewards_of(other, raw.column_names).specs == ["accuracy"]


def test_the_scorer_of_other_data_is_refused_before_a_model_is_loaded():
    with pytest.raises(UserError, match="scores what `--data reasoning-gym:TASK` makes, and no other data"):
        check_columns(["reasoning_gym"], ["answer"])
