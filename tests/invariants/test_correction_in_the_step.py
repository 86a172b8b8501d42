"""A corrected step against a naive float64 one: both loss paths, every loss type, however the update is cut."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Quiet, digit_share
from lowvram_grpo.kernels.runtime import HAS_TRITON
from test_full_gradient import BETA, EPSILON, LORA, TEMPERATURE, naive_logps

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.recipe.config import CORRECTION_MODES
from lowvram_grpo.training.correction import Correction

LOW, HIGH = 0.6, 1.5


def naive_loss(model, reference, rollout, loss_type, mode, t_max):
    """Before the first update: rho is 1, so the weight is the quotient of policy and sampler, without gradient."""
    batch, terms, lengths = rollout.batch, [], []
    for i, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids)):
        logp, a = naive_logps(model, prompt, completion), rollout.advantages.values[i].double()
        with torch.no_grad():
            ref = naive_logps(reference, prompt, completion)
            gap = logp - batch.sampling_per_token_logps[i].double()
            quotient = (gap if mode.startswith("token") else gap.sum().expand_as(gap)).exp()
            inside = (quotient >= LOW) & (quotient <= HIGH)
            weight = quotient.clamp(LOW, HIGH) if mode.endswith("truncate") else quotient * inside
        ratio, d = torch.exp(logp - logp.detach()), ref - logp
        policy = -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a)
        terms.append((weight * policy + BETA * ratio * (d.exp() - d - 1)).sum())
        lengths.append(len(completion))
    if loss_type == "grpo":
        return sum(t / n for t, n in zip(terms, lengths)) / len(terms)
    return sum(terms) / (len(terms) * t_max if loss_type == "dr_grpo" else sum(lengths))


def drifted(rollout, by=0.4):
    """As a sampler with other kernels, or coarser weights, would have reported its log-probs."""
    generator = torch.Generator().manual_seed(7)
    logps = rollout.batch.sampling_per_token_logps
    rollout.batch.sampling_per_token_logps = [p + torch.randn(p.shape, generator=generator) * by for p in logps]
    return rollout


ALL = list(zip(["grpo", "bnpo", "dr_grpo", "dapo"], CORRECTION_MODES))


@pytest.mark.parametrize("iterations", [1, 2], ids=["one step a rollout", "old log-probs"])
@pytest.mark.parametrize("loss_type, mode", ALL)
def test_plain_steps_however_they_are_cut(config, dataset, tokenizer, model, loss_type, mode, iterations):
    compare(config, dataset, tokenizer, model, loss_type, mode, iterations, cuts=(8, 1))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
@pytest.mark.parametrize("loss_type, mode, iterations", [(*ALL[0], 1), (*ALL[3], 2)])
def test_fused_steps(config, dataset, tokenizer, model, loss_type, mode, iterations):
    compare(config, dataset, tokenizer, model, loss_type, mode, iterations, cuts=(8,), fused_loss="on")


def compare(config, dataset, tokenizer, model, loss_type, mode, iterations, *, cuts, fused_loss="off"):
    """Loss and every gradient of a step off the reference, micro-batches of so many rows, with the naive one's."""
    model.generation_config.eos_token_id = [1, *range(30, 41)]
    rollout, start = None, copy.deepcopy(model)
    for rows in cuts:
        args = config(
            loss_type=loss_type, temperature=TEMPERATURE, beta=BETA, epsilon=EPSILON, per_device_train_batch_size=rows,
            num_iterations=iterations, workspace_mib=1, fused_loss=fused_loss,
        )  # fmt: skip
        trainer = GRPOTrainer(
            copy.deepcopy(start), digit_share, args, dataset, processing_class=tokenizer, peft_config=LORA,
            observer=Quiet(),
        )  # fmt: skip
        trainer.learner.correction = Correction(mode, LOW, HIGH)
        assert trainer.learner.kernels.fused == (fused_loss == "on")
        reference = copy.deepcopy(trainer.model).double().eval()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for p in trainer.model.parameters():
                if p.requires_grad:
                    p += torch.randn(p.shape, generator=generator) * 0.05
        if rollout is None:
            rollout = drifted(trainer.collect([dataset[i] for i in (1, 3)], 0))
            exact = copy.deepcopy(trainer.model).double().eval()
            expected = naive_loss(exact, reference, rollout, loss_type, mode, args.max_completion_length)
            expected.backward()
        updates = trainer._learnable(rollout)
        trainer.model.train()
        loss = float(trainer._gradients(updates[0]))
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
        for (name, mine), theirs in zip(trainer.model.named_parameters(), exact.parameters()):
            if mine.requires_grad:
                scale = theirs.grad.abs().max()
                assert (mine.grad.double() - theirs.grad).abs().max() <= 2e-4 * scale + 1e-7, name
        trainer.metrics["train"].add_update(trainer._sums)
        logged = trainer.metrics["train"].take()
        assert logged["sampling/importance_sampling_ratio/max"] <= HIGH + 1e-5
        assert 0 < logged["sampling/corrected_share"] < 1


def test_a_second_pass_over_a_rollout_keeps_its_weights(config, dataset, tokenizer, model):
    args = config(num_iterations=2, beta=0.0)
    trainer = GRPOTrainer(model, digit_share, args, dataset, processing_class=tokenizer, peft_config=LORA)
    trainer.learner.correction = Correction("token_truncate", None, HIGH)
    [micro] = trainer._learnable(drifted(trainer.collect([dataset[i] for i in (1, 3)], 0)))[0]
    before = micro.weights.clone()
    for _ in range(2):
        trainer.learner.loss(micro)
    assert torch.equal(micro.weights, before)
