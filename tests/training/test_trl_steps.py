"""Two trainers from the same weights on the same completions, TRL's and ours: the same optimizer steps, the same
metrics."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

import pytest
import torch
from trl_pair import Run, digits, length, make_folder, our_run, trl_run

pytest.importorskip("trl", reason="TRL is the oracle: pip install -e '.[test]' on Python 3.11 or later")

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# Seconds: everything else must agree.
_CLOCK = {"step_time"}
# Steps far enough from the policy that sampled for bounds to bind, and near enough that rounding does not grow.
_FAR = {"learning_rate": 0.5, "max_steps": 4}
OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 2, "learning_rate": 0.5, "max_steps": 5}
_TWO = {"rewards": (digits, length), "reward_weights": (1.0, 0.5)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Runs of TRL's trainer, made once, and of ours from the weights that TRL's started with."""
    folder = tmp_path_factory.mktemp("trl")
    models = {mixture: make_folder(folder / f"model-{mixture}", mixture=mixture) for mixture in (False, True)}

    @cache
    def theirs(mixture: bool, lora: bool, rewards: tuple, given: tuple) -> Run:
        return trl_run(folder / "theirs", models[mixture], list(rewards), _lora() if lora else None, **_settings(given))

    def run(
        ours: dict[str, Any] | None = None, *, rewards=(digits,), lora=False, mixture=False, **both
    ) -> tuple[Run, Run]:  # fmt: skip
        """(TRL's, ours); `ours` are settings of ours alone."""
        trl = theirs(mixture, lora, rewards, tuple(sorted(both.items())))
        given = {**_settings(tuple(both.items())), **(ours or {})}
        adapter = _lora() if lora else None
        return trl, our_run(folder / "ours", models[mixture], list(rewards), adapter, trl.weights[0], **given)

    return run


def _settings(given: tuple) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given}


def _lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)


def agree(trl: Run, ours: Run, *, apart: set[str] = frozenset(), weights: float = 2e-6) -> None:
    """After each step: weights within `weights`, and every number that TRL logged but those `apart`."""
    assert len(trl.weights) == len(ours.weights) > 3
    for step, (theirs, mine) in enumerate(zip(trl.weights, ours.weights)):
        assert theirs.keys() == mine.keys()
        for name, value in theirs.items():
            place = f"step {step}, {name}: ".__add__
            torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=weights, msg=place)
    assert any(not value.equal(trl.weights[0][name]) for name, value in trl.weights[-1].items())
    assert len(trl.log) == len(ours.log) > 1
    for step, (theirs, mine) in enumerate(zip(trl.log, ours.log), 1):
        for name in theirs.keys() - _CLOCK - apart:
            assert name in mine, name
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-6), f"step {step}: {name}"


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_off_policy(pair, loss_type, beta):
    """Each rollout serves four steps: two halves of it, twice."""
    trl, ours = pair(loss_type=loss_type, beta=beta, **OFF_POLICY, **_bounds(loss_type))
    agree(trl, ours)
    if loss_type != "sapo":
        bound = {"cispo": "cispo_clip_ratio", "vespo": "vespo/phi_seq_mean"}.get(loss_type, "clip_ratio/region_mean")
        assert trl.log[3][bound] not in (0, 1)


def _bounds(loss_type: str) -> dict[str, Any]:
    # cispo's upper bound is epsilon_high itself, not 1 + epsilon_high.
    return {"epsilon_high": 1.5} if loss_type == "cispo" else {}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy(pair, loss_type):
    agree(*pair(loss_type=loss_type, beta=0.04, temperature=0.5, **_bounds(loss_type)))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_evaluation(pair, loss_type):
    """Before and after training on: loss, rewards, lengths, kl and entropy of completions for other prompts."""
    held_out = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 16, "num_generations_eval": 4}
    trl, ours = pair(loss_type=loss_type, **held_out, **_FAR)
    agree(trl, ours)
    assert len(trl.evaluations) == len(ours.evaluations) == 2
    for theirs, mine in zip(trl.evaluations, ours.evaluations):
        for name in theirs.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-6), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_accumulated(pair, loss_type):
    """Two micro-batches here are one batch there. TRL's own accumulation takes the same step but for bnpo, which is
    divided by a micro-batch's tokens there, and by the update's here; what is a mean over tokens or completions is one
    of the micro-batches' means there."""
    whole = {"loss_type": loss_type, "num_iterations": 2, **_FAR, **_bounds(loss_type)}
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trl, ours = pair(halves, **whole)
    agree(trl, ours)
    cut, _ = pair(**{**whole, **halves})
    if loss_type == "bnpo":
        with pytest.raises(AssertionError):
            agree(cut, ours, apart=set(trl.log[0]))
    else:
        agree(cut, ours, apart=_MEANS_OF_MEANS)


_MEANS_OF_MEANS = {"entropy", "kl", "cispo_clip_ratio", "vespo/phi_seq_mean"}
_MEANS_OF_MEANS |= {f"clip_ratio/{kind}" for kind in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")}


def test_several_steps_in_a_row_of_the_log(pair):
    """All are means over the steps there; here minima and maxima are the least and the greatest."""
    trl, ours = pair(logging_steps=2, num_iterations=2, **_FAR)
    extremes = {name for name in trl.log[0] if name.endswith(("_min", "_max", "min_length", "max_length"))}
    extremes |= {f"completions/{kind}_terminated_length" for kind in ("min", "max")}
    agree(trl, ours, apart=extremes)
    one_by_one, _ = pair(num_iterations=2, **_FAR)
    for row, pairs in zip(ours.log, (one_by_one.log[:2], one_by_one.log[2:])):
        assert row["clip_ratio/high_max"] == pytest.approx(max(step["clip_ratio/high_max"] for step in pairs), rel=1e-3)


ONE_BY_ONE = {
    "lora": {"lora": True},
    "lora-off-policy": {"lora": True, "num_iterations": 2, **_FAR},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4},
    "plain-k3": {"use_bias_correction_kl": False, "num_iterations": 2, **_FAR},
    "sequence": {"importance_sampling_level": "sequence", "num_iterations": 2, **_FAR},
    "sequence-gspo": {
        "importance_sampling_level": "sequence", "num_iterations": 2, **_FAR, "epsilon": 3e-2, "epsilon_high": 4e-2,
    },
    "delta": {"delta": 1.5, "epsilon_high": 0.3, "num_iterations": 2, **_FAR},
    "off-policy-mask": {"off_policy_mask_threshold": 0.02, "num_iterations": 2, **_FAR},
    "top-entropy": {"top_entropy_quantile": 0.4, "num_iterations": 2, **_FAR},
    "entropy": {"entropy_coef": 0.05, "num_iterations": 2, **_FAR},
    "entropy-dapo-lora": {"entropy_coef": 0.05, "loss_type": "dapo", "lora": True, **_FAR},
    "entropy-of-the-top": {"entropy_coef": 0.05, "top_entropy_quantile": 0.5, **_FAR},
    "entropy-adaptive": {
        "use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_coef_delta": 0.02, "entropy_coef_max": 0.05,
        "entropy_target": 2.65, **_FAR, "max_steps": 6,
    },
    "masked": {"mask_truncated_completions": True, "num_iterations": 2, **_FAR},
    "masked-dapo": {
        "mask_truncated_completions": True, "loss_type": "dapo", "steps_per_generation": 2, "num_iterations": 2, **_FAR,
    },
    "dapo-halves": {
        "loss_type": "dapo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "steps_per_generation": 4, **_FAR,
    },
    "two-rewards": {**_TWO},
    "reference-follows": {
        "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6, "beta": 0.5, **_FAR,
        "max_steps": 6,
    },
    "reference-follows-within-a-rollout": {
        "sync_ref_model": True, "ref_model_sync_steps": 1, "num_iterations": 3, "beta": 0.5, **_FAR, "max_steps": 6,
    },
    "scaled-by-batch": {"scale_rewards": "batch", **_TWO},
    "not-scaled": {"scale_rewards": "none"},
    "normalize-then-sum": {"multi_objective_aggregation": "normalize_then_sum", **_TWO},
    "shuffled": {"shuffle_dataset": True, "max_steps": 5},
    "conversations": {"chat": True},
    "experts": {"mixture": True, "router_aux_loss_coef": 0.1},
    "warmup-cosine-decay": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 5, "weight_decay": 0.1},
}  # fmt: skip
SAMPLERS = {
    "token_truncate": {"num_iterations": 2},
    "token_mask": {"vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.3},
    "sequence_truncate": {"vllm_importance_sampling_clip_max": 1.5, "loss_type": "dapo", "num_iterations": 2},
    "sequence_mask": {"off_policy_mask_threshold": 0.05, "num_iterations": 2, "vllm_importance_sampling_clip_min": 0.5},
    "token_mask of vespo": {"loss_type": "vespo", "num_iterations": 2},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_of_another_sampler(pair, name):
    """vLLM's log-probs differ from the policy's: their quotients weigh the loss, and are logged."""
    given = {"use_vllm": True, "vllm_importance_sampling_mode": name.split()[0], **_FAR, **SAMPLERS[name]}
    trl, ours = pair({"self_test": False}, **given)
    agree(trl, ours)
    assert trl.log[0]["sampling/sampling_logp_difference/max"] > 0.3


# Whose names mean another thing there, on purpose.
APART = {
    # Whether the std of the whole batch is 0 there; the share of groups without a difference here.
    "scaled-by-batch": {"frac_reward_zero_std"},
    "normalize-then-sum": {"frac_reward_zero_std"},
    "dapo-halves": _MEANS_OF_MEANS,
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_one_by_one(pair, name):
    trl, ours = pair(**ONE_BY_ONE[name])
    agree(trl, ours, apart=APART.get(name, set()), weights=1e-5 if name == "adamw" else 2e-6)
    if name == "entropy-adaptive":
        assert len({row["entropy_coef"] for row in trl.log}) > 2


# Names of TRL's that no run here has, or none of these.
NOT_HERE = {
    "tools/call_frequency": "docs/trl.md: no tools yet",
    "tools/failure_frequency": "docs/trl.md: no tools yet",
}


def test_every_metric_of_trl_has_its_name_here(pair):
    import trl.trainer.grpo_trainer as module

    source = inspect.getsource(module)
    named = set(re.findall(r'_metrics\[(?:mode|"train")\]\[f?"([^"]+)"\]', source))
    named = {name.replace("{reward_func_name}", "digits") for name in named}
    assert {"kl", "cispo_clip_ratio", "rewards/digits/std", "entropy_coef", "num_tokens"} <= named
    runs = [
        pair(**OFF_POLICY, loss_type="grpo", beta=0.04),
        pair(**OFF_POLICY, loss_type="cispo", beta=0.04, **_bounds("cispo")),
        pair(**OFF_POLICY, loss_type="vespo", beta=0.04),
        pair(**ONE_BY_ONE["entropy"]),
        pair(**ONE_BY_ONE["experts"]),
    ]
    assert named - {name for _, ours in runs for name in ours.log[-1]} == NOT_HERE.keys()
