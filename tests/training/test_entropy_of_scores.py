"""The entropy of scored tokens as something to learn from: through a whole model, the learner and the plan."""

from __future__ import annotations

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from lowvram_grpo.kernels.linear_logps import linear_logps_ref
from lowvram_grpo.kernels.runtime import HAS_TRITON
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.plan.counting import Blueprint
from lowvram_grpo.plan.prediction import predict
from lowvram_grpo.policy.head import head_of
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.training.scoring import score, scored_states
from tests.plan.measured import settings
from tests.policy.passes import GROUPS, TINY, adapted, micro_batch, tiny

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
BONUS = {"fixed": {"entropy_coef": 0.01}, "adaptive, still 0": {"use_adaptive_entropy": True}}


def gradients(model, entropy, weights):
    model.zero_grad(set_to_none=True)
    (entropy * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family, extra", [("Llama", {}), ("Gemma2", {"final_logit_softcapping": 4.0})])
@pytest.mark.parametrize("trained", ["adapter", "all weights"])
@pytest.mark.parametrize("path", [None, "cublas"] if HAS_TRITON else [None])
def test_gradients_are_those_of_whole_logits(family, extra, trained, path):
    model = tiny(family, **extra)
    model = adapted(model) if trained == "adapter" else model.requires_grad_()
    shared = [GROUPS] if why_not(model) is None else []
    assert shared or family == "Gemma2"
    batch, t = micro_batch(), 0.9
    weights = torch.randn(batch[3].shape, generator=torch.Generator().manual_seed(3)) * batch[3]
    states, scored = scored_states(model, *batch), batch[3].bool()
    whole = linear_logps_ref(states, head_of(unwrap(model)), batch[2][scored], temperature=t)
    expected = gradients(model, whole.entropy, weights[scored])
    given = {"temperature": t, "workspace_mib": 1, "path": path, "entropy_gradient": True}
    for groups in (None, *shared):
        found = gradients(model, score(model, *batch, group_sizes=groups, **given).entropy, weights)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            assert (found[name] - grad).abs().max() <= 2e-4 * grad.abs().max() + 2e-6, name


def test_nobody_learns_from_it_unasked():
    model = adapted(tiny("Llama"))
    assert not score(model, *micro_batch(), temperature=1.0, workspace_mib=1).entropy.requires_grad


@pytest.mark.parametrize("bonus", BONUS)
@pytest.mark.parametrize("extra", [{}, {"kl_estimator": "exact", "beta": 0.04}, {"num_iterations": 2}], ids=str)
def test_the_learner_asks_for_it_when_the_loss_has_a_bonus(config, dataset, tokenizer, bonus, extra):
    def scored(**given):
        args = config(per_device_train_batch_size=3, **{"beta": 0.0, **extra, **given})
        trainer = GRPOTrainer(
            make_model(), digit_share, args, dataset, processing_class=tokenizer, observer=Quiet(), peft_config=LORA
        )
        rollout = trainer.collect([dataset[i] for i in range(2)], 0)
        trainer.model.train()
        return trainer, [(micro, trainer.learner.loss(micro)) for micro in trainer._learnable(rollout)[0]]

    trainer, micros = scored(**BONUS[bonus])
    for micro, (_, scores) in micros:
        scores.entropy.sum().backward()
        if micro.old_per_token_logps is not None:  # scored apart, without a gradient: the first ratio is exactly 1
            assert torch.equal(scores.logps.detach(), micro.old_per_token_logps)
    assert all(p.grad.any() for n, p in trainer.model.named_parameters() if "lora_B" in n and p.grad is not None)
    with torch.no_grad():
        assert not trainer.learner.score(micros[0][0]).entropy.requires_grad
    assert not any(scores.entropy.requires_grad for _, (_, scores) in scored()[1])


def test_the_plan_counts_the_direction_of_the_bonus():
    """Where the worst comes to the worst, every row is diffuse: H floats a token, from its scoring to its gradient."""
    model = make_model(**{**TINY, "hidden_size": 256, "vocab_size": 4096})
    blueprint = Blueprint(model.config, "none", torch.bfloat16, {"r": 4, "target_modules": "all-linear"})
    args = lambda **given: settings(
        "plan",
        **{
            "num_generations": 4, "prompts_per_step": 2, "per_device_train_batch_size": 4, "max_prompt_length": 64,
            "max_completion_length": 200, "optim": "adamw_torch", "workspace_mib": 4, **given,
        },
    )  # fmt: skip
    plain, zero, bonus, adaptive = (
        predict(blueprint, args(**given)).phases
        for given in ({}, {"entropy_coef": 0.0}, {"entropy_coef": 0.01}, {"use_adaptive_entropy": True})
    )
    assert plain == zero and bonus == adaptive
    direction = 4 * 200 * 256 * 4
    more = {phase: (bonus[phase] - plain[phase]) / direction for phase in plain}
    assert 0.9 < more["forward"] < 1.2 and 0 <= more["backward"] < 1.2, more
    assert not any(share for phase, share in more.items() if phase not in ("forward", "backward")), more
