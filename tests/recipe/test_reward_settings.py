"""Parameters of rewards in a recipe: Open R1's keys and ms-swift's, from a file and from flags to the functions."""

from __future__ import annotations

import pytest

from lowvram_grpo.cli.flags import parse_extra
from lowvram_grpo.errors import UserError
from lowvram_grpo.jobs.task import rewards_of, sandbox_notice
from lowvram_grpo.recipe.resolve import resolve

OPEN_R1_YAML = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: some/data
max_completion_length: 50
reward_funcs: [accuracy, format, tag_count, cosine, soft_overlong_punishment]
reward_weights: [1.0, 0.5, 0.25, 2.0, 1.0]
cosine_min_value_wrong: -1.0
cosine_max_len: 40
soft_punish_cache: 10
code_language: python
"""


def written(tmp_path, text):
    path = tmp_path / "grpo.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_open_r1_recipe_gets_open_r1s_rewards(tmp_path):
    recipe = resolve({}, written(tmp_path, OPEN_R1_YAML))
    rewards = rewards_of(recipe, ["prompt", "solution"])
    fixed = ["accuracy_reward", "format_reward", "tag_count_reward"]
    assert [f.__name__ for f in rewards.functions[:3]] == fixed
    assert recipe.training["reward_weights"] == [1.0, 0.5, 0.25, 2.0, 1.0]
    cosine, overlong = rewards.functions[3:]
    assert cosine([r"\boxed{4}"], ["5"], completion_ids=[[1]]) == [
        pytest.approx(-0.5 - 0.5 * (1 + 0.7604) / 2, abs=1e-4)
    ]
    assert overlong([[1] * n for n in (40, 45, 50, 51)]) == [0.0, -0.5, -1.0, -1.0], "of the run's own longest"
    assert sandbox_notice(rewards) == ""


def test_ours_stay_ours_under_our_key():
    recipe = resolve({"reward": ["accuracy", "format"]})
    assert recipe.reward == ["accuracy", "format"]
    assert resolve(parse_extra(["--reward-funcs", "accuracy", "--reward-funcs", "tag_count:2"])).reward == [
        "accuracy_reward", "tag_count:2",
    ]  # fmt: skip


def test_ms_swifts_names_mean_the_value_at_a_length(tmp_path):
    text = """
cosine_min_len_value_wrong: -0.4
cosine_max_len_value_wrong: 0.1
cosine_min_len_value_correct: 1.5
cosine_max_len_value_correct: 0.6
soft_max_length: 90
soft_cache_length: 9
"""
    recipe = resolve({}, written(tmp_path, text))
    assert (recipe.cosine_min_value_wrong, recipe.cosine_max_value_wrong) == (-0.4, 0.1)
    assert (recipe.cosine_max_value_correct, recipe.cosine_min_value_correct) == (1.5, 0.6)
    assert (recipe.max_completion_len, recipe.soft_punish_cache) == (90, 9)


def test_what_was_set_is_written_and_read_again(tmp_path):
    recipe = resolve(parse_extra(["--cosine-max-len", "77", "--code-timeout=2.5", "--enforce-same-language"]))
    text = recipe.to_toml()
    assert "cosine_max_len = 77  # flag" in text and "repetition_n_grams" not in text
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    again = resolve({}, tmp_path / "recipe.toml")
    assert (again.cosine_max_len, again.code_timeout, again.enforce_same_language) == (77, 2.5, True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("cosine_max_len: 0", "cosine_max_len is 0; it must be at least 1"),
        ("repetition_max_penalty: 0.5", "repetition_max_penalty is 0.5; it must be at most 0: it is a penalty"),
        ("code_timeout: 0", "code_timeout is 0; it must be above 0"),
        ("code_memory_mib: 1", "code_memory_mib is 1; it must be at least 64"),
        ("cosine_min_value_wrong: low", "cosine_min_value_wrong is 'low', which is not of type float"),
        ("cosine_max_length: 5", "Unknown setting 'cosine_max_length' .* \\(did you mean 'cosine_max_len'\\?\\)"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, line, said):
    with pytest.raises(UserError, match=said):
        resolve({}, written(tmp_path, line))


def test_programs_are_confined_or_refused(tmp_path, monkeypatch):
    from lowvram_grpo.rewards import sandbox

    monkeypatch.setattr(sandbox, "why_not", lambda: None)
    recipe = resolve({}, written(tmp_path, "reward_funcs: [binary_code]\nparallel_code_exec_per_proc: 3\n"))
    rewards = rewards_of(recipe, ["prompt", "verification_info"])
    assert rewards.functions[0].num_parallel == 3 and rewards.functions[0].limits.seconds == 5.0
    assert sandbox_notice(rewards).startswith("programs run in a sandbox: no network, no processes (seccomp)")
    monkeypatch.setattr(sandbox, "why_not", lambda: "not on Windows.")
    with pytest.raises(UserError, match=r"^not on Windows"):
        rewards_of(recipe, ["prompt", "verification_info"])
    recipe.code_provider = "e2b"
    with pytest.raises(UserError, match=r"^code_provider e2b sends"):
        rewards_of(recipe, ["prompt", "verification_info"])
