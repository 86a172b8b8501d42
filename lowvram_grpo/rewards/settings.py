"""Parameters of the built-in rewards that have any, under the names that Open R1's recipes give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CODE_LANGUAGES = ("python", "javascript", "r", "java", "bash", "cpp")
# Parameters of Open R1's that have nothing to be parameters of here, and why.
FOREIGN = {
    "e2b_router_url": "programs run in a sandbox on this machine",
    "morph_router_url": "programs run in a sandbox on this machine",
    "ioi_provider": "the reward ioi_code is not built in",
    "code_eval_test_batch_size": "it is of ioi_code and cf_code, which are not built in",
    "code_eval_scoring_mode": "it is of cf_code, which is not built in",
}
# What the functions' own arguments are called, where that is another name.
ARGUMENTS = {
    "cosine_min_len_value_wrong": "cosine_min_value_wrong",
    "cosine_max_len_value_wrong": "cosine_max_value_wrong",
    "cosine_min_len_value_correct": "cosine_max_value_correct",
    "cosine_max_len_value_correct": "cosine_min_value_correct",
    "soft_max_length": "max_completion_len",
    "soft_cache_length": "soft_punish_cache",
}


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class RewardSettings:
    """What a recipe may say about its rewards; every field is a key of a recipe file and a flag."""

    cosine_min_value_wrong: float = _setting(0.0, "Reward `cosine`: of a wrong reply as short as can be.")
    cosine_max_value_wrong: float = _setting(-0.5, "Reward `cosine`: of a wrong reply of cosine_max_len.")
    cosine_min_value_correct: float = _setting(0.5, "Reward `cosine`: of a right reply of cosine_max_len.")
    cosine_max_value_correct: float = _setting(1.0, "Reward `cosine`: of a right reply as short as can be.")
    cosine_max_len: int = _setting(1000, "Reward `cosine`: characters at which a reply counts as longest.")
    repetition_n_grams: int = _setting(3, "Reward `repetition_penalty`: words in a row that count as repeated.")
    repetition_max_penalty: float = _setting(-1.0, "Reward `repetition_penalty`: of nothing but repetition; 0 or less.")
    code_language: str = _setting(
        "python", f"Reward `code_format`: the block's language ({', '.join(CODE_LANGUAGES)})."
    )
    code_provider: str = _setting("local", "Rewards `code`, `binary_code`: where programs run; local, in a sandbox.")
    parallel_code_exec_per_proc: int | None = _setting(
        None, "Rewards `code`, `binary_code`: programs that run at a time; unset, one a core, at most 8."
    )
    enforce_same_language: bool = _setting(
        False, "Rewards `code`, `binary_code`: stop where the rows of a batch are in several languages."
    )
    code_timeout: float = _setting(5.0, "Rewards `code`, `binary_code`: seconds a program may take on one test.")
    code_memory_mib: int = _setting(1024, "Rewards `code`, `binary_code`: MiB of address space a program may take.")
    max_completion_len: int | None = _setting(
        None, "Reward `soft_overlong_punishment`: tokens beyond which it is -1; unset, max_completion_length."
    )
    soft_punish_cache: int | None = _setting(
        None, "Reward `soft_overlong_punishment`: the last tokens before that, in which it falls; unset, a fifth."
    )


@dataclass(kw_only=True)
class GRPOScriptArguments(RewardSettings):
    """What `get_reward_funcs` takes, with the names and defaults of Open R1's class of that name, as far as it is about
    rewards. Two defaults are ours: programs run locally, and punishment for length follows max_completion_length."""

    dataset_name: str | None = None
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy", "format", "tag_count"])
