"""Loss, gradients and metrics are TRL's on the same tensors; so are the advantages of the same rewards."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from packaging.version import Version
from trl_loss import DEFAULTS, GROUP, Losses, Tensors, TRLLoss, make_tensors, trl_advantages

import lowvram_grpo.training.learner as learner_module
from lowvram_grpo import GRPOConfig, UserError
from lowvram_grpo.objective import LOSS_TYPES, Advantages
from lowvram_grpo.rewards.runner import RewardRunner
from lowvram_grpo.rollout.batch import RolloutBatch
from lowvram_grpo.training import parts
from lowvram_grpo.training.experience import Rollout
from lowvram_grpo.training.learner import learner_of
from lowvram_grpo.training.loss import KernelChoice
from lowvram_grpo.training.metrics import UpdateSums, rollout_metrics
from lowvram_grpo.training.scoring import Scores

pytest.importorskip("trl", reason="TRL is the oracle: pip install -e '.[test]' on Python 3.11 or later")

LEVELS = ("token", "sequence")
# torch.clamp has no slope on its bounds from 2.14 on, and ratios are exactly 1 on policy (docs/trl.md).
SLOPELESS_BOUNDS = Version(torch.__version__) >= Version("2.14.dev0")
# What a run may switch on, one at a time, beside every loss type at both levels.
OPTIONS = {
    "as it is": {},
    "no KL": {"beta": 0.0},
    "plain k3": {"use_bias_correction_kl": False},
    "more KL": {"beta": 0.7},
    "clip-higher": {"epsilon": 0.1, "epsilon_high": 0.4},
    "no clipping": {"epsilon": 0.0},
    "two-sided": {"delta": 1.3, "epsilon_high": 0.25},
    "two-sided within": {"delta": 0.9},
    "off-policy mask": {"off_policy_mask_threshold": 0.1},
    "high entropy": {"top_entropy_quantile": 0.3},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy bonus of the high": {"entropy_coef": 0.05, "top_entropy_quantile": 0.5},
    "truncated left out": {"mask_truncated_completions": True},
    "truncated left out of both": {
        "mask_truncated_completions": True, "top_entropy_quantile": 0.5, "entropy_coef": 0.1,
    },
    "temperatures": {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.7},
    "shapes": {"vespo_k_pos": 1.0, "vespo_lambda_pos": 1.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 0.5},
    "sampler": {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
    "sampler of sequences": {"use_vllm": True, "vllm_importance_sampling_mode": "sequence_truncate"},
    "sampler and all": {
        "use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "off_policy_mask_threshold": 0.1,
        "top_entropy_quantile": 0.5, "entropy_coef": 0.1, "delta": 1.3, "mask_truncated_completions": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_model()


class OurLoss:
    """Our loss with the settings of a run, from `Learner.learnable` on: only the scores are given."""

    def __init__(self, folder, model, fused: bool = False, **overrides: Any):
        settings = {**DEFAULTS, **overrides}
        rows, parts = settings.pop("rows", 8), settings["gradient_accumulation_steps"]
        self.args = GRPOConfig(
            output_dir=str(folder), use_cpu=True, report_to="none", temperature=1.0, shared_prefix="off",
            num_generations=GROUP, per_device_train_batch_size=rows // parts,
            num_iterations=2 if settings.pop("off_policy", False) else 1, **settings,
        )  # fmt: skip

        self.reference = SimpleNamespace(kind="frozen copy", model=copy.deepcopy(model))
        self.reference.active = lambda: nullcontext(self.reference.model)
        self.learner = learner_of(
            self.args, model, self.reference if self.args.beta else None, KernelChoice("torch", fused, "as told"),
            nullcontext,
        )  # fmt: skip

    def step(self, tensors: Tensors, monkeypatch) -> Losses:
        logps, entropies = tensors.logps.clone().requires_grad_(), tensors.entropies.clone().requires_grad_()

        def score(model, prompt_ids, prompt_mask, completion_ids, completion_mask, **kwargs):
            rows, columns = prompt_ids[:, -1], slice(completion_ids.shape[1])
            policy = logps if torch.is_grad_enabled() else tensors.old
            given = tensors.ref if model is self.reference.model else policy
            shown = lambda values: torch.where(completion_mask.bool(), values[rows, columns], 0.0)
            return Scores(shown(given), shown(entropies))

        monkeypatch.setattr(learner_module, "score", score)
        learner = self.learner
        updates, _ = learner.learnable(_rollout(tensors), self.args.batch_plan(), 0)
        sums, total = UpdateSums(learner.objective), torch.zeros(())
        for micro in learner.with_entropy_masks(updates[0]):
            share, scores = learner.loss(micro)
            sums.add(share, scores)
            total = total + share.loss
        total.backward()
        zero = lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        metrics = sums.take()
        if learner.entropy is not None:
            metrics |= learner.entropy.step(sums.acted_entropy)
        return Losses(float(total.detach()), zero(logps), zero(entropies), metrics)


def _rollout(tensors: Tensors) -> Rollout:
    """Each completion's prompt is its number."""
    rows = len(tensors.lengths)
    batch = RolloutBatch(
        [[row] for row in range(rows)],
        [[3] * length for length in tensors.lengths],
        [sampled[:length] for sampled, length in zip(tensors.sampled, tensors.lengths)],
        tensors.truncated,
        None if (mask := tensors.tool_mask) is None else [row[:n].tolist() for row, n in zip(mask, tensors.lengths)],
    )
    nothing = torch.zeros(rows)
    advantages = Advantages(tensors.advantages, torch.zeros(rows // GROUP, dtype=torch.bool), nothing)
    return Rollout(batch, ["x"] * rows, ["x"] * rows, nothing, nothing[:, None], advantages, {})


def agree(ours: Losses, theirs: Losses, case: dict[str, Any], tensors: Tensors) -> None:
    say = lambda text: f"{case}: {text}"
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=2e-6), case
    torch.testing.assert_close(ours.logps, theirs.logps, rtol=2e-5, atol=1e-6, msg=say)
    torch.testing.assert_close(ours.entropies, theirs.entropies, rtol=2e-5, atol=1e-7, msg=say)
    expected = theirs.metrics
    if case.get("mask_truncated_completions"):
        expected = _of_counted(expected, case, tensors)
    for name, value in expected.items():
        assert name in ours.metrics, (case, name)
        assert ours.metrics[name] == pytest.approx(value, rel=2e-5, abs=1e-6), (case, name)


def _of_counted(metrics: dict[str, float], case: dict[str, Any], tensors: Tensors) -> dict[str, float]:
    """Where there is a number a completion, TRL's means are of all, those without a token included, which have ratio 1
    and are not clipped; ours are of those that the loss counts."""
    rows, counted = len(tensors.truncated), tensors.truncated.count(False)
    found = dict(metrics)
    per_sequence = case["importance_sampling_level"] == "sequence"
    for name, value in metrics.items():
        if name == "vespo/phi_seq_mean":
            found[name] = (value * rows - (rows - counted)) / counted
        elif per_sequence and name.endswith(("_mean", "cispo_clip_ratio")):
            found[name] = value * rows / counted
    if per_sequence:
        # A minimum over what counts is no minimum over all.
        found.pop("clip_ratio/low_min", None)
    return found


def _case(loss_type: str, level: str, option: str) -> dict[str, Any]:
    case = {"loss_type": loss_type, "importance_sampling_level": level, **OPTIONS[option]}
    if loss_type == "cispo":  # its upper bound is the field itself, not 1 and the field
        case["epsilon_high"] = 1 + case.get("epsilon_high", 0.3)
    return case


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradients_and_metrics(tmp_path, monkeypatch, model, loss_type, option):
    if (loss_type, option) == ("vespo", "sampler of sequences"):
        with pytest.raises(UserError, match="token_truncate or token_mask"):  # as TRL's trainer does
            OurLoss(tmp_path, model, **_case(loss_type, "token", option))
        return
    tensors = make_tensors()
    for level, off_policy in product(LEVELS, (False, True)):
        if option == "no clipping" and not off_policy and SLOPELESS_BOUNDS:
            continue
        case = _case(loss_type, level, option)
        theirs = TRLLoss(**case).step(tensors, off_policy=off_policy)
        ours = OurLoss(tmp_path, model, off_policy=off_policy, **case).step(tensors, monkeypatch)
        agree(ours, theirs, case, tensors)
        assert theirs.logps.any()


WITH_TOOLS = ("as it is", "off-policy mask", "high entropy", "entropy bonus of the high", "sampler and all",
              "truncated left out", "sampler of sequences")  # fmt: skip


@pytest.mark.parametrize("fused", [False, True], ids=["PyTorch", "kernel"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_tools_inserted_is_in_nothing(tmp_path, monkeypatch, model, loss_type, fused):
    """Loss, KL, entropies, clipping and denominators count sampled tokens alone, whole and in micro-batches."""
    tensors = make_tensors(inserted=True)
    split = {"gradient_accumulation_steps": 4, "steps_per_generation": 4}
    for level, (i, option) in product(LEVELS, enumerate(WITH_TOOLS)):
        if (loss_type, option) == ("vespo", "sampler of sequences"):
            continue
        case, parts = _case(loss_type, level, option), split if i % 2 else {}
        theirs = TRLLoss(**case).step(tensors, off_policy=True)
        ours = OurLoss(tmp_path, model, fused=fused, off_policy=True, **case, **parts).step(tensors, monkeypatch)
        agree(ours, theirs, case, tensors)
        assert theirs.logps.any() and not ours.logps[tensors.tool_mask == 0].any()
        assert not ours.entropies[tensors.tool_mask == 0].any()


def our_advantages(
    folder, rewards: torch.Tensor, weights: list[float], group: int = GROUP, **settings: Any
) -> tuple[Rollout, dict[str, float]]:
    """A rollout of completions that are rewarded so, through the collector of a run."""
    args = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        num_generations=GROUP,
        reward_weights=weights,
        **settings,
    )
    rows = len(rewards)

    def judge(column):
        def reward(completions, **kwargs):
            return [None if value != value else value for value in rewards[:, column].tolist()]

        reward.__name__ = f"r{column}"
        return reward

    runner = RewardRunner([judge(column) for column in range(len(weights))], weights=weights)
    batch = RolloutBatch([[3]] * rows, [[3]] * rows, [torch.zeros(1)] * rows, [False] * rows)
    engine = SimpleNamespace(sampling=SimpleNamespace(pad_id=0, eos_ids=(1,)), generate=lambda *a, **k: batch)
    guard = SimpleNamespace(run=lambda name, work: work())
    collector = parts.make_collector(engine, runner, make_tokenizer(), guard, args, lambda phase: None)
    rollout, _ = collector.collect([{"prompt": "a"}] * (rows // group), group, seed=0, trainer_state=None)
    return rollout, rollout_metrics(rollout, runner.names)


NAN = float("nan")
# Three groups: one of two rewards with gaps, one whose rewards are all equal, one with a completion nobody judges.
REWARDS = torch.tensor(
    [[1.0, 2.0], [0.25, NAN], [NAN, 1.0], [0.5, -1.0]] + [[0.5, 0.25]] * 4
    + [[0.0, 1.0], [NAN, NAN], [1.0, 3.0], [0.75, 0.5]]
)  # fmt: skip
SCALED = {
    "group": {"scale_rewards": "group"},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none"},
    "decoupled": {"multi_objective_aggregation": "normalize_then_sum"},
}


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("weights", [[1.0, 0.5], [1.0, 0.0], [0.3, -2.0]], ids=str)
def test_advantages_and_reward_metrics(tmp_path, scaled, weights):
    theirs, noted = trl_advantages(REWARDS, weights, **SCALED[scaled])
    rollout, metrics = our_advantages(tmp_path, REWARDS, weights, **SCALED[scaled])
    torch.testing.assert_close(rollout.advantages.values, theirs, rtol=1e-5, atol=1e-6)
    # Of groups here; there of the std that was divided by, which is the batch's own in two of these.
    apart = {"frac_reward_zero_std"} if scaled in ("batch", "decoupled") else set()
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    for name in noted.keys() - apart:
        assert metrics[name] == pytest.approx(noted[name], rel=1e-5, abs=1e-6), name


def test_equal_rewards_that_round_teach_nothing_here(tmp_path):
    """The mean of eight times 0.35 is not 0.35: TRL divides what rounding leaves by little but its epsilon."""
    rewards = torch.cat([torch.full((8, 1), 0.35), torch.tensor([[0.0], [1.0]] * 4)])
    theirs, _ = trl_advantages(rewards, [1.0], 8)
    rollout, metrics = our_advantages(tmp_path, rewards, [1.0], 8)
    assert rollout.advantages.values[:8].eq(0).all() and metrics["frac_reward_zero_std"] == 0.5
    assert theirs[:8].ne(0).all()
    torch.testing.assert_close(rollout.advantages.values, theirs, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_of_the_kernel(tmp_path, monkeypatch, model, loss_type):
    """The same by one Triton launch a micro-batch."""
    tensors = make_tensors()
    for level, option in product(LEVELS, ("two-sided", "sampler and all")):
        case = _case(loss_type, level, option)
        theirs = TRLLoss(**case).step(tensors, off_policy=True)
        ours = OurLoss(tmp_path, model, fused=True, off_policy=True, **case).step(tensors, monkeypatch)
        agree(ours, theirs, case, tensors)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_in_micro_batches(tmp_path, monkeypatch, model, loss_type):
    """Four micro-batches here are one batch there, quantiles, bonus and metrics included."""
    tensors, parts = make_tensors(), {"gradient_accumulation_steps": 4, "steps_per_generation": 4}
    for level, option in product(LEVELS, ("as it is", "sampler and all")):
        case = _case(loss_type, level, option)
        theirs = TRLLoss(**case).step(tensors, off_policy=True)
        ours = OurLoss(tmp_path, model, off_policy=True, **case, **parts).step(tensors, monkeypatch)
        agree(ours, theirs, case, tensors)
