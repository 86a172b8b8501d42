"""Settings that do not go together are refused or said, and the defaults say nothing."""

from __future__ import annotations

import re

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.objective import LOSS_TYPES
from lowvram_grpo.recipe.combinations import _READ_BY, combination_notices


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval_strategy": "steps", "eval_steps": 5},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo", "sapo_temperature_neg": 2.0},
        {"loss_type": "vespo", "vespo_k_pos": 1.0},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 3.0},
        {"use_adaptive_entropy": True, "entropy_target": 0.5, "entropy_coef": 0.1},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"off_policy_mask_threshold": 0.1, "num_iterations": 2},
        {"off_policy_mask_threshold": 0.1, "kv_cache_dtype": "int8"},
        {"sync_ref_model": True, "ref_model_sync_steps": 3},
        {"pad_to_multiple_of": "auto"},
        {"pad_to_multiple_of": None},
    ],
)
def test_what_goes_together_says_nothing(config, settings):
    args = config(**settings)
    assert args.notices() == combination_notices(args) == []


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"loss_type": "cispo"}, "epsilon_high as the upper bound of the ratio itself"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.1}, "epsilon has no effect with loss_type cispo"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 2.0}, "delta has no effect with loss_type cispo"),
        ({"loss_type": "sapo", "epsilon": 0.1}, "epsilon has no effect with loss_type sapo"),
        ({"loss_type": "vespo", "epsilon_high": 0.3}, "epsilon_high has no effect with loss_type vespo"),
        ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos has no effect with loss_type grpo: it belongs to sapo"),
        ({"vespo_k_pos": 1.0, "vespo_k_neg": 1.0}, "vespo_k_pos, vespo_k_neg have no effect with loss_type grpo"),
        ({"loss_type": "luspo"}, "importance_sampling_level sequence"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "by itself"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, "weighs each sequence by its length"),
        ({"delta": 1.1}, "delta 1.1 lies below 1 \\+ epsilon_high"),
        ({"entropy_coef_max": 0.5}, "entropy_coef_max has no effect without use_adaptive_entropy"),
        ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, "lies outside of entropy_coef_min"),
        ({"use_adaptive_entropy": True, "entropy_coef_min": 0.1}, "lies outside of entropy_coef_min"),
        ({"use_adaptive_entropy": True, "entropy_coef_delta": 0.0}, "changes nothing"),
        ({"off_policy_mask_threshold": 0.1}, "finds little to mask"),
        ({"off_policy_mask_threshold": -0.1, "num_iterations": 2}, "below 0"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "batch"}, "scale_rewards batch has no"),
        ({"beta": 0.0, "kl_estimator": "k2"}, "kl_estimator has no effect with beta 0"),
        ({"beta": 0.0, "use_bias_correction_kl": False}, "use_bias_correction_kl has no effect with beta 0"),
        ({"beta": 0.0, "reference_offload": True}, "reference_offload has no effect with beta 0"),
        ({"beta": 0.0, "sync_ref_model": True}, "sync_ref_model has no effect with beta 0"),
        ({"ref_model_sync_steps": 3}, "ref_model_sync_steps has no effect without sync_ref_model"),
        ({"pad_to_multiple_of": "8"}, "pad_to_multiple_of has no effect"),
        ({"use_transformers_paged": True}, "use_transformers_paged has no effect"),
        ({"transformers_continuous_batching_config": {"a": 1}}, "continuous_batching_config has no effect"),
        ({"log_multimodal": False}, "log_multimodal has no effect"),
        ({"include_for_metrics": ["loss"], "label_names": ["x"]}, "include_for_metrics, label_names have no effect|"
         "label_names, include_for_metrics have no effect"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config has no effect"),
        ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint has no effect"),
    ],
)  # fmt: skip
def test_what_does_not_is_said_once(config, settings, words):
    assert [bool(re.search(words, said)) for said in config(**settings).notices()] == [True]


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"entropy_coef_min": 0.5, "entropy_coef_max": 0.1}, "entropy_coef_min is 0.5 and entropy_coef_max 0.1"),
        ({"log_completions_hub_repo": "me/x"}, "log_completions is off"),
        ({"loss_type": "vespo", "use_vllm": True}, "vllm_importance_sampling_mode is sequence_mask"),
        ({"loss_type": "gspo"}, "loss_type is 'gspo'"),
        ({"pad_to_multiple_of": "abc"}, "pad_to_multiple_of is 'abc'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; it must be at least 1"),
        ({"max_completion_length": None}, "max_completion_length is None"),
        ({"transformers_continuous_batching_config": "x"}, "no JSON object"),
        ({"max_tool_calling_iterations": 0}, "at least 1"),
        ({"router_aux_loss_coef": -1.0}, "at least 0"),
    ],
)
def test_contradictions_are_refused(config, settings, words):
    with pytest.raises(UserError, match=words):
        config(**settings)


def test_what_a_loss_reads_is_known_of_every_loss():
    assert {loss for readers in _READ_BY.values() for loss in readers} == set(LOSS_TYPES)


def test_vespo_with_a_mode_by_tokens(config):
    modes = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}
    assert config(loss_type="vespo", **modes).loss_type == "vespo"
    assert config(loss_type="vespo", use_vllm=True, vllm_importance_sampling_correction=False).loss_type == "vespo"
