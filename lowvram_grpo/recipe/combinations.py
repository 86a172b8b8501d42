"""Settings of the objective that do not go together: refused where they contradict each other, said where one of them
has no effect, or another one than its digits say."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lowvram_grpo.errors import UserError
from lowvram_grpo.objective import CLIPPED
from lowvram_grpo.recipe.weight_offload import check_weight_offload

# Which losses read a setting of the ratio, and what the others do instead.
_READ_BY = {
    "epsilon": CLIPPED,
    "epsilon_high": (*CLIPPED, "cispo"),
    "delta": CLIPPED,
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), ("sapo",)),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), ("vespo",)),
}
# Their denominator counts tokens, so that a ratio of a whole sequence counts once a token of it.
_PER_TOKEN = ("bnpo", "dr_grpo", "dapo", "cispo")
_ADAPTIVE = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
_SYNC = ("ref_model_mixup_alpha", "ref_model_sync_steps")


# Not typed as a GRPOConfig: that module asks this one.
def check_combinations(args: Any) -> None:
    """Raises:
    UserError: two settings of a GRPOConfig contradict each other."""
    if args.entropy_coef_min > args.entropy_coef_max:
        raise UserError(
            f"entropy_coef_min is {args.entropy_coef_min} and entropy_coef_max {args.entropy_coef_max}; the first must "
            "not be above the second."
        )
    if args.log_completions_hub_repo and not args.log_completions:
        raise UserError(
            "log_completions_hub_repo is set, but log_completions is off; set it too, or drop log_completions_hub_repo."
        )
    check_weight_offload(args)
    mode = args.vllm_importance_sampling_mode
    if (
        args.loss_type == "vespo"
        and args.use_vllm
        and args.vllm_importance_sampling_correction
        and not mode.startswith("token_")
    ):
        raise UserError(
            f"loss_type vespo takes the product of vLLM's token weights into its own, and "
            f"vllm_importance_sampling_mode is {mode}; set it to token_truncate or token_mask."
        )


def combination_notices(args: Any) -> list[str]:
    """One sentence for each setting of the objective that another one leaves without its effect."""
    default = {f.name: f.default for f in fields(args)}
    changed = lambda names: [name for name in names if getattr(args, name) != default[name]]
    said = [*_about_the_loss(args, changed), *_about_the_ratio(args), *_about_entropy(args, changed)]
    if args.multi_objective_aggregation == "normalize_then_sum" and args.scale_rewards != default["scale_rewards"]:
        said.append(
            f"scale_rewards {args.scale_rewards} has no effect with normalize_then_sum, which divides each reward by "
            "its group's spread and their sum by the batch's."
        )
    if not args.beta:
        said += _no_effect(changed(("kl_estimator", "use_bias_correction_kl")), "with beta 0: there is no KL term")
        said += _no_effect(changed(("reference_offload",)), "with beta 0: there is no reference")
    if args.sync_ref_model and not args.beta:
        said.append("sync_ref_model has no effect with beta 0: there is no reference.")
    if not args.sync_ref_model:
        said += _no_effect(changed(_SYNC), "without sync_ref_model")
    return said


def _no_effect(names: list[str], where: str) -> list[str]:
    return [f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect {where}."] if names else []


def _about_the_loss(args: Any, changed: Any) -> list[str]:
    loss, said = args.loss_type, []
    by_reader: dict[tuple[str, ...], list[str]] = {}
    for name in changed(_READ_BY):
        instead_of_high = name == "epsilon" and loss == "cispo" and args.epsilon_high is None
        if loss not in _READ_BY[name] and not instead_of_high:
            by_reader.setdefault(_READ_BY[name], []).append(name)
    for readers, names in by_reader.items():
        whose = f"it belongs to {readers[0]}" if len(readers) == 1 else "it clips no ratio between those bounds"
        said += _no_effect(names, f"with loss_type {loss}: {whose}")
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if loss == "cispo" and high < 1:
        said.append(
            f"loss_type cispo takes epsilon_high as the upper bound of the ratio itself, not of its distance from 1, "
            f"and it is {high}{'' if args.epsilon_high is not None else ' (epsilon)'}: every token's ratio is cut to "
            "that, and the gradient is as much smaller; the ScaleRL paper sets 5.0."
        )
    if loss in CLIPPED and args.delta is not None and args.delta < 1 + high:
        said.append(
            f"delta {args.delta} lies below 1 + epsilon_high ({1 + high:g}), so it clips ratios that epsilon_high "
            "would leave alone; it is meant to lie above."
        )
    return said


def _about_the_ratio(args: Any) -> list[str]:
    loss, sequence, said = args.loss_type, args.importance_sampling_level == "sequence", []
    if sequence and loss in _PER_TOKEN:
        said.append(
            f"importance_sampling_level sequence with loss_type {loss} weighs each sequence by its "
            "length; loss_type grpo weighs all alike, as in the paper (GSPO)."
        )
    if sequence and loss == "vespo":
        said.append(
            "loss_type vespo makes its weights of whole sequences by itself; leave importance_sampling_level at token."
        )
    if loss == "luspo" and not sequence:
        said.append(
            "loss_type luspo is the paper's with importance_sampling_level sequence; by tokens it sums each "
            "completion's clipped terms."
        )
    threshold, other_sampler = args.off_policy_mask_threshold, args.use_vllm or args.kv_cache_dtype == "int8"
    if threshold is not None and threshold < 0:
        said.append(
            f"off_policy_mask_threshold {threshold} is below 0: what was sampled from the policy itself is left out, "
            "too, where its advantage is negative."
        )
    elif threshold is not None and not other_sampler and args.batch_plan().steps_per_rollout == 1:
        said.append(
            "off_policy_mask_threshold finds little to mask: each rollout serves one step, and the policy itself "
            "samples it; num_iterations, steps_per_generation and use_vllm make it differ."
        )
    return said


def _about_entropy(args: Any, changed: Any) -> list[str]:
    said, plan = [], args.batch_plan()
    several = plan.completions_per_rollout // plan.updates_per_rollout > plan.micro_batch_size
    if args.top_entropy_quantile < 1 and several:
        said.append(
            "top_entropy_quantile takes the threshold of a whole step, which is therefore scored once more; with "
            "per_device_train_batch_size as large as the step it is read from the pass itself."
        )
    if not args.use_adaptive_entropy:
        return said + _no_effect(changed(_ADAPTIVE), "without use_adaptive_entropy")
    low, high = args.entropy_coef_min, args.entropy_coef_max
    if not low <= args.entropy_coef <= high:
        said.append(
            f"entropy_coef {args.entropy_coef} is where an adaptive one starts, and lies outside of entropy_coef_min "
            f"{low} and entropy_coef_max {high}."
        )
    if not args.entropy_coef_delta:
        said.append("use_adaptive_entropy changes nothing with entropy_coef_delta 0: entropy_coef stays as it is.")
    return said
