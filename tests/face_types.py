"""What a user's type checker sees of the public face. mypy reads it (pyproject.toml), nothing runs it.

A `type: ignore` stands where a mistake must be found: one that is not needed any more is an error itself.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import assert_type

from lowvram_grpo import GRPOConfig, GRPOTrainer, UserError, __version__
from lowvram_grpo.rewards.registry import BUILTIN, is_model, parse_spec, resolve_reward

assert_type(__version__, str)

args = GRPOConfig(output_dir="run", num_generations=8, beta=0.0, loss_type="dapo", generation_kwargs={"min_p": 0.1})
assert_type(args.num_generations, int)
assert_type(args.max_prompt_length, int | None)
assert_type(args.beta, float)
assert_type(args.kl_estimator, str)
assert_type(args.reward_weights, list[float] | None)
assert_type(args.generation_kwargs, dict[str, Any] | str | None)
GRPOConfig(num_generations="8")  # type: ignore[arg-type]


def brevity(completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


trainer = GRPOTrainer("Qwen/Qwen2.5-0.5B", [brevity, BUILTIN["accuracy"]], args)
assert_type(trainer, GRPOTrainer)
GRPOTrainer()  # type: ignore[call-arg]
GRPOTrainer("Qwen/Qwen2.5-0.5B", brevity, {"beta": 0.0})  # type: ignore[arg-type]

function, weight = resolve_reward("accuracy:0.5")
assert_type(weight, float)
assert_type(is_model("accuracy"), bool)
assert_type(parse_spec("accuracy:0.5").target, str)
error: Exception = UserError("one sentence")
