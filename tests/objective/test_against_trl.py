"""The objective beside TRL's own functions, on the same tensors."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from lowvram_grpo.objective import (
    LOSS_TYPES,
    Objective,
    grpo_loss,
    high_entropy_mask,
    high_entropy_threshold,
    off_policy_mask,
    token_weights,
    vespo_weight,
)

trl = pytest.importorskip("trl", reason="TRL is not installed")
from trl.trainer.grpo_trainer import GRPOTrainer as TRL  # noqa: E402

if not hasattr(TRL, "get_gamma_weights"):
    pytest.skip("this TRL has no vespo", allow_module_level=True)


def batch(seed=0, B=6, T=9, spread=0.3):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    logps = -normal(B, T).abs() * 2
    mask = (torch.arange(T) < torch.tensor([9, 1, 4, 6, 3, 2])[:B, None]).long()
    advantages = normal(B)
    advantages[3] = 0.0
    old, ref, sampled = (logps + spread * normal(B, T) for _ in range(3))
    return {"logps": logps, "old": old, "ref": ref, "sampled": sampled, "advantages": advantages, "mask": mask,
            "entropy": normal(B, T).abs()}  # fmt: skip


def stub(objective: Objective, **more):
    """What TRL's `_compute_loss` reads of a trainer, for one micro-batch that is the whole rollout."""
    args = SimpleNamespace(
        delta=objective.delta, use_bias_correction_kl=objective.use_bias_correction_kl, steps_per_generation=1,
        **{name: getattr(objective, name) for name in vars(objective) if name.startswith(("sapo", "vespo"))},
    )  # fmt: skip
    identity = lambda x, **_: x
    self = SimpleNamespace(
        args=args, beta=objective.beta, loss_type=objective.loss_type, epsilon_low=objective.epsilon,
        epsilon_high=objective.upper, importance_sampling_level=objective.importance_sampling_level,
        top_entropy_quantile=objective.top_entropy_quantile, max_completion_length=20,
        off_policy_mask_threshold=objective.off_policy_mask_threshold, aux_loss_enabled=False,
        use_vllm=False, vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=identity, reduce=identity, pad_across_processes=identity),
        get_off_policy_mask=TRL.get_off_policy_mask, get_gamma_weights=TRL.get_gamma_weights,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    self.get_high_entropy_mask = lambda *a: TRL.get_high_entropy_mask(self, *a)
    vars(self).update(more)
    return self


def theirs(p: dict, objective: Objective, inputs: dict | None = None, **more):
    """(loss, gradient, metrics)"""
    logps = p["logps"].clone().requires_grad_()
    self = stub(objective, **more)
    self._get_per_token_logps_and_entropies = lambda *a, **k: (logps, p["entropy"], None)
    nothing = torch.zeros(len(logps), 0)
    given = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": p["mask"], "completion_mask": p["mask"],
        "advantages": p["advantages"], "old_per_token_logps": p["old"], "ref_per_token_logps": p["ref"],
        "num_items_in_batch": p["mask"].sum(), **(inputs or {}),
    }  # fmt: skip
    loss = TRL._compute_loss(self, None, given)
    loss.backward()
    return loss.detach(), logps.grad, {name: values[0] for name, values in self._metrics["train"].items()}


def factor_of(p: dict, o: Objective, ratio=None, sampled=None):
    factor = torch.ones_like(p["logps"])
    if o.loss_type == "vespo":
        factor = factor * vespo_weight(p["advantages"], p["logps"] - p["old"], p["mask"], o, ratio)
    elif ratio is not None:
        factor = factor * ratio
    if o.off_policy_mask_threshold is not None:
        before = p["old"] if sampled is None else sampled
        factor = factor * off_policy_mask(p["advantages"], p["logps"], before, p["mask"], o.off_policy_mask_threshold)
    if o.top_entropy_quantile < 1:
        threshold = high_entropy_threshold(p["entropy"], p["mask"], o.top_entropy_quantile)
        factor = factor * high_entropy_mask(p["entropy"], p["mask"], threshold)
    return factor


def ours(p: dict, o: Objective, factor):
    logps = p["logps"].clone().requires_grad_()
    weights = token_weights(p["mask"], o.loss_type, 20)
    ref = p["ref"] if o.beta else None
    terms = grpo_loss(logps, p["old"], ref, p["advantages"], p["mask"], weights, o, factor=factor)
    terms.loss.backward()
    return terms.loss.detach(), logps.grad, terms


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("extra", [
    {},
    {"use_bias_correction_kl": False, "epsilon_high": 0.28},
    {"delta": 1.15, "epsilon": 0.1},
    {"off_policy_mask_threshold": 0.05},
    {"top_entropy_quantile": 0.3},
    {"top_entropy_quantile": 0.6, "off_policy_mask_threshold": 0.02, "sapo_temperature_pos": 0.7, "vespo_k_neg": 1.5},
])  # fmt: skip
def test_loss_gradient_and_metrics(loss_type, level, beta, extra):
    if loss_type == "cispo":
        extra = {**extra, "epsilon_high": 1.1}
    o = Objective(beta=beta, loss_type=loss_type, importance_sampling_level=level, **extra)
    p = batch()
    loss, gradient, metrics = theirs(p, o)
    our_loss, our_gradient, terms = ours(p, o, factor_of(p, o))
    close(our_loss, loss)
    close(our_gradient, gradient)
    if beta:
        close((terms.kl * p["mask"]).sum() / p["mask"].sum(), torch.tensor(metrics["kl"]))
    if loss_type in ("sapo", "vespo"):
        assert not terms.high_clipped.any() and not terms.low_clipped.any()
        return
    mask = p["mask"].bool()
    mean = lambda x: float((x[:, 0] if level == "sequence" else x[mask]).float().mean())
    if loss_type == "cispo":
        assert mean(terms.high_clipped) == pytest.approx(metrics["cispo_clip_ratio"])
    else:
        assert mean(terms.low_clipped) == pytest.approx(metrics["clip_ratio/low_mean"])
        assert mean(terms.high_clipped) == pytest.approx(metrics["clip_ratio/high_mean"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("per_sequence", [False, True])
def test_the_correction_of_another_sampler(loss_type, per_sequence):
    """It multiplies the policy term and not the KL, and goes into vespo's weight."""
    o = Objective(beta=0.04, loss_type=loss_type, off_policy_mask_threshold=0.05)
    p = batch()
    ratio = ((p["old"] - p["sampled"]) * p["mask"]).exp()
    ratio = ratio.prod(1, keepdim=True) if per_sequence else ratio.clamp(max=1.2).masked_fill(ratio < 0.8, 0.0)
    loss, gradient, _ = theirs(
        p, o, {"importance_sampling_ratio": ratio, "sampling_per_token_logps": p["sampled"]},
        use_vllm=True, vllm_importance_sampling_correction=True,
    )  # fmt: skip
    our_loss, our_gradient, _ = ours(p, o, factor_of(p, o, ratio, p["sampled"]))
    close(our_loss, loss)
    close(our_gradient, gradient)


@pytest.mark.parametrize("spread", [0.3, 5.0, 30.0])
def test_vespo_weights_far_from_the_policy(spread):
    p = batch(spread=spread)
    log_ratio = p["logps"] - p["old"]
    o = Objective(vespo_k_pos=1.5, vespo_lambda_neg=0.0)
    for ratio in (None, torch.rand(6, 9).masked_fill(p["mask"] == 0, 1.0), torch.zeros(6, 1)):
        their = TRL.get_gamma_weights(p["advantages"][:, None], log_ratio, p["mask"], ratio, 1.5, 3.0, 3.0, 0.0)
        close(vespo_weight(p["advantages"], log_ratio, p["mask"], o, ratio), their)


def test_an_off_policy_mask_where_the_sampler_could_not_score():
    kept = set()
    for seed, threshold in product(range(3), (-0.2, 0.0, 0.1, 0.5)):
        p = batch(seed, spread=1.0)
        p["sampled"][0, 2] = p["sampled"][2, 0] = torch.nan
        their = TRL.get_off_policy_mask(p["advantages"][:, None], p["logps"], p["sampled"], p["mask"], threshold)
        our = off_policy_mask(p["advantages"], p["logps"], p["sampled"], p["mask"], threshold)
        assert torch.equal(our.long(), their)
        kept |= {int(our.sum())}
    assert len(kept) > 1


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9, 1.0])
def test_high_entropy_masks(share):
    p, self = batch(), stub(Objective())
    for entropy in (p["entropy"], p["entropy"].round(), torch.zeros(6, 9)):
        for mask in (p["mask"], torch.zeros_like(p["mask"])):
            their = TRL.get_high_entropy_mask(self, entropy, mask, 1 - share)
            assert torch.equal(high_entropy_mask(entropy, mask, high_entropy_threshold(entropy, mask, share)), their)
