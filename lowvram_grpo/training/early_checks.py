"""What would end a run after its model was loaded, looked at before: prompts that do not fit, the evaluation, the best
model's metric, the attention that was asked for, the hub.

`recipe.settings` looks at what the settings alone decide; here data, rewards, the device and the network have a say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lowvram_grpo.data.encoding import LengthReport, prompt_length_report
from lowvram_grpo.data.load import check_dataset
from lowvram_grpo.errors import UserError
from lowvram_grpo.objective import CLIPPED
from lowvram_grpo.policy.attention_choice import check_asked
from lowvram_grpo.recipe.settings import value_of
from lowvram_grpo.rewards.signatures import names_before_loading
from lowvram_grpo.training.pushing import check_hub

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lowvram_grpo.recipe.config import GRPOConfig

# What an evaluation measures of itself, without eval_ in front; rewards, and what they log, come to it.
EVAL_METRICS = (
    "loss", "reward", "reward_std", "frac_reward_zero_std", "entropy", "kl", "num_tokens", "runtime",
    "samples_per_second", "steps_per_second", "step_time", "ratio/min", "ratio/max",
    *(f"completions/{part}_length" for part in ("mean", "min", "max")),
    *(f"completions/{part}_terminated_length" for part in ("mean", "min", "max")), "completions/clipped_ratio",
)  # fmt: skip


def check_before_loading(args: GRPOConfig, rewards: Sequence[Any], evaluated: Any) -> None:
    """What can be known before a model is loaded, but not from the settings alone.

    Raises:
        UserError: the hub, the best model's metric or the attention are out of reach.
    """
    check_asked(args.attention, args.device)
    names, may_log = names_before_loading(rewards)
    check_best_metric(args, names, evaluated, (), final=not may_log)
    check_hub(args)


def prompt_lengths(
    args: GRPOConfig, tokenizer: PreTrainedTokenizerBase, data: Dataset, *, whole: bool = True
) -> LengthReport:
    """How long the prompts of prepared data are, and how many will be cut; without `whole` it is part of it."""
    return prompt_length_report(
        tokenizer,
        data,
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
        whole=whole,
    )


def check_lengths(
    args: GRPOConfig,
    lengths: LengthReport,
    model_config: PretrainedConfig,
    tell: Callable[[str], None],
    spelled: Callable[[str], str] = str,
) -> int:
    """Say how many prompts are cut.

    Args:
        spelled: how the settings to lower are written for the person who is told.

    Returns:
        the tokens of the longest prompt, cut as it will be.

    Raises:
        UserError: even a cut prompt and its completion exceed the model's positions.
    """
    if lengths.cut:
        tell(lengths.sentence(args.max_prompt_length))
    longest = min(lengths.longest, args.max_prompt_length or lengths.longest)
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit and longest + args.max_completion_length > limit:
        raise UserError(
            f"The longest prompt ({longest} tokens) and max_completion_length {args.max_completion_length} do not fit "
            f"the model's {limit} positions; lower {spelled('max_prompt_length')} or "
            f"{spelled('max_completion_length')}."
        )
    return longest


def check_evaluation(args: GRPOConfig, evaluated: Any) -> None:
    """Raises:
    UserError: an evaluation is asked for without data, or on data that can't be used."""
    if evaluated is not None:
        check_dataset(evaluated, "eval_dataset", several=True)
    elif args.eval_on_start or value_of(args.eval_strategy) != "no":
        what = "eval_on_start is set" if args.eval_on_start else f"eval_strategy is {value_of(args.eval_strategy)}"
        raise UserError(f"{what}, but there is no eval_dataset; pass one, or drop it.")


def _of_the_loss(args: GRPOConfig) -> list[str]:
    """What an evaluation measures with this loss alone."""
    found = ["policy_loss"] if args.entropy_bonus else []
    found += ["aux_loss"] if args.router_aux_loss_coef else []
    if args.loss_type in CLIPPED:
        found += [f"clip_ratio/{part}" for part in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")]
    return found + {"cispo": ["cispo_clip_ratio"], "vespo": ["vespo/phi_seq_mean"]}.get(args.loss_type, [])


def check_best_metric(
    args: GRPOConfig, rewards: Sequence[str], evaluated: Any, logged: Iterable[str], *, final: bool
) -> None:
    """Whether the metric that the best model is chosen by will be there at the first evaluation.

    Args:
        rewards: names of the reward functions.
        evaluated: the evaluation data: one dataset, or several by name.
        logged: metrics that the rewards have logged themselves.
        final: no other can come: the rewards have been called, or none of them logs any.

    Raises:
        UserError: it won't.
    """
    wanted = args.metric_for_best_model
    if wanted is None or evaluated is None:
        return
    wanted = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
    names = [*EVAL_METRICS, *(f"rewards/{name}/{part}" for name in rewards for part in ("mean", "std")), *logged]
    names += _of_the_loss(args)
    if not args.beta:
        names.remove("kl")
    prefixes = [f"eval_{name}_" for name in evaluated] if isinstance(evaluated, dict) else ["eval_"]
    known = [prefix + name for prefix in prefixes for name in names]
    if wanted in known or not final:
        return
    usual = [name for name in known if name.endswith(("_reward", "_loss", "/mean", *logged))]
    several = "there are several evaluation datasets, and " if len(prefixes) > 1 else ""
    raise UserError(
        f"metric_for_best_model is {args.metric_for_best_model!r}, but {several}an evaluation gives no such "
        f"metric; choose one of {', '.join(usual)}."
    )
