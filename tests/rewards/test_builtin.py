"""Which function a name stands for, with which parameters."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import lowvram_grpo.rewards as rewards
from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards import GRPOScriptArguments, get_reward_funcs, sandbox
from lowvram_grpo.rewards.builtin import SYNONYMS
from lowvram_grpo.rewards.code import BinaryCodeReward
from lowvram_grpo.rewards.registry import BUILTIN, as_open_r1, full_marks, is_builtin, is_model, resolve_reward
from lowvram_grpo.rewards.runner import RewardRunner
from lowvram_grpo.rewards.settings import RewardSettings

OPEN_R1 = {
    "accuracy": "accuracy_reward",
    "format": "format_reward",
    "reasoning_steps": "reasoning_steps_reward",
    "cosine": "cosine_scaled_reward",
    "repetition_penalty": "repetition_penalty_reward",
    "length": "len_reward",
    "tag_count": "tag_count_reward",
    "code": "code_reward",
    "binary_code": "binary_code_reward",
    "ioi_code": "ioi_code_reward",
    "cf_code": "cf_code_reward",
    "code_format": "code_format_reward",
    "soft_overlong_punishment": "soft_overlong_punishment_reward",
}


def test_every_reward_of_an_open_r1_script_has_its_function_and_name():
    assert [f.__name__ for f in get_reward_funcs(GRPOScriptArguments(reward_funcs=list(OPEN_R1)))] == [
        *OPEN_R1.values()
    ]
    defaults = get_reward_funcs(GRPOScriptArguments())
    assert [f.__name__ for f in defaults] == ["accuracy_reward", "format_reward", "tag_count_reward"]
    with pytest.raises(UserError, match=r"unknown reward 'lenght' \(did you mean 'length'\?\)"):
        get_reward_funcs(GRPOScriptArguments(reward_funcs=["lenght"]))


def test_parameters_come_from_the_scripts_arguments():
    args = SimpleNamespace(
        reward_funcs=["cosine", "repetition_penalty", "soft_overlong_punishment", "code_format", "binary_code"],
        cosine_min_value_wrong=-3.0, cosine_max_value_wrong=-2.0, cosine_min_value_correct=2.0,
        cosine_max_value_correct=3.0, cosine_max_len=40, repetition_n_grams=1, repetition_max_penalty=-4.0,
        max_completion_len=10, soft_punish_cache=4, code_language="cpp", parallel_code_exec_per_proc=3,
    )  # fmt: skip
    cosine, repetition, overlong, code_format, code = get_reward_funcs(args)
    replies = [r"\boxed{5}" + " " * 31, r"\boxed{4}" + " " * 31]
    assert cosine(replies, ["5", "5"], completion_ids=[[1]] * 2) == pytest.approx([2.0, -2.0])
    assert repetition(["a a a a"]) == [-3.0] and overlong([[1] * 8]) == [-0.5]
    assert code_format(["<think>\na\n</think>\n<answer>\n```cpp\nx\n```\n</answer>"]) == [1.0]
    assert isinstance(code, BinaryCodeReward) and code.num_parallel == 3
    assert full_marks(cosine) == 3.0 and full_marks(repetition) == full_marks(overlong) == 0.0


@pytest.mark.parametrize("name", ["ioi_code", "cf_code", "ioi_code_reward"])
def test_what_needs_a_cluster_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"the reward '{name}' of Open R1 is not built in: it .*; take code"):
        resolve_reward(f"{name}:2")
    function = get_reward_funcs(GRPOScriptArguments(reward_funcs=["ioi_code"]))[0]
    with pytest.raises(UserError, match="'ioi_code_reward' of Open R1 is not built in"):
        function(["x"], id=["y"])


@pytest.mark.parametrize("synonym", SYNONYMS)
def test_synonyms_stand_for_the_same(synonym):
    assert resolve_reward(f"{synonym}:0.5") == (BUILTIN[SYNONYMS[synonym]], 0.5)
    assert is_builtin(synonym) and not is_model(f"{synonym}:0.5")


def test_two_names_mean_open_r1s_functions_under_its_key():
    assert [*map(as_open_r1, ["accuracy", "format:0.5", "tag_count", "a/b.py:f:2"])] == [
        "accuracy_reward", "format_reward:0.5", "tag_count", "a/b.py:f:2",
    ]  # fmt: skip


def test_a_function_is_found_behind_a_dot_as_in_trls_scripts():
    assert resolve_reward("lowvram_grpo.rewards.think_format_reward:2") == (rewards.think_format_reward, 2.0)
    assert not is_model("lowvram_grpo.rewards.think_format_reward") and is_model("org/model.v2")
    with pytest.raises(UserError, match="'no_such' does not import"):
        resolve_reward("no_such.function")


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("code", {"code_provider": "morph"}, "code_provider morph sends programs to the service of Morph"),
        ("code_format", {"code_language": "pyton"}, r"'pyton' \(did you mean 'python'\?\); it must be one of"),
        ("soft_overlong_punishment", {"max_completion_len": 10, "soft_punish_cache": 11}, "11, more than max_comp"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(name, settings, said):
    with pytest.raises(UserError, match=said):
        resolve_reward(name, RewardSettings(**settings))
    resolve_reward("tag_count", RewardSettings(**settings))  # no matter of others


def test_programs_are_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "no sandbox here.")
    for name in ("code", "binary_code_reward"):
        with pytest.raises(UserError, match=r"^no sandbox here"):
            resolve_reward(name)
    resolve_reward("code_format")


def test_punishment_by_its_bare_name_asks_for_lengths():
    with pytest.raises(UserError, match="needs max_completion_len and soft_punish_cache; give get_soft"):
        BUILTIN["soft_overlong_punishment"](completion_ids=[[1]])


def test_full_marks():
    assert {name: full_marks(function) for name, function in BUILTIN.items() if full_marks(function) != 1.0} == {
        "label": 5.0, "label_strict": 10.0, "content": 5.0, "len": 0.5, "repetition_penalty": 0.0,
        "soft_overlong_punishment": 0.0,
    }  # fmt: skip


# Rewards of data or settings of their own; tests of theirs.
LEFT_OUT = ("code", "binary_code", "soft_overlong_punishment", "reasoning_gym")


def test_all_of_them_score_one_batch():
    names = [name for name in BUILTIN if name not in LEFT_OUT]
    runner = RewardRunner([BUILTIN[name] for name in names])
    reply = "<think>\nwhy\n</think>\n<answer>\n\\boxed{5}\n</answer>"
    columns = {"answer": ["5"], "solution": ["$5$"]}
    result = runner([[{"role": "user", "content": "2+3?"}]], [[{"content": reply}]], [[1, 2, 3]], columns)
    found = dict(zip(names, result.per_func[0].tolist()))
    wanted = {"accuracy": 1, "accuracy_reward": 1, "reasoning_accuracy": 1, "format": 1, "format_reward": 1,
              "think_format": 1, "tag_count": 1, "reasoning_steps": 0, "len": 0, "repetition_penalty": 0,
              "code_format": 0}  # fmt: skip
    assert found | wanted == found and 0.9 < found["cosine"] < 1
    assert len(set(runner.names)) == len(names)


def test_the_package_exports_them_and_loads_none():
    assert all(callable(getattr(rewards, name)) for name in rewards.__all__) and set(rewards.__all__) <= set(
        dir(rewards)
    )
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = rewards.no_such
    code = "import sys, lowvram_grpo.rewards; print([m for m in sys.modules if m.startswith('lowvram_grpo.rewards.')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_trls_public_rewards_are_all_there():
    trl = pytest.importorskip("trl.rewards")
    assert {name for names in trl._import_structure.values() for name in names} <= set(rewards.__all__)
