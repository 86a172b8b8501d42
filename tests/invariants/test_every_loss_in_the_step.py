"""A step of every loss type with everything that can be asked of it, against a float64 one with full logits, however
the update is cut."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from conftest import Quiet, digit_share
from lowvram_grpo.kernels.runtime import HAS_TRITON
from test_correction_in_the_step import drifted
from test_full_gradient import BETA, LORA, TEMPERATURE

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.objective import Objective, grpo_loss, off_policy_mask, vespo_weight
from lowvram_grpo.training.correction import Correction
from lowvram_grpo.training.experience import pad_right

LOW, HIGH = 0.6, 1.5
# The first tokens of a group have one distribution: a threshold in the middle of these would be decided by rounding.
COEF = 0.3
WITH = {"entropy_coef": COEF}
SETTINGS = {
    "luspo, sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05, "off_policy_mask_threshold": 0.005},
    "sapo": {"loss_type": "sapo", "top_entropy_quantile": 0.4, "beta": 0.0},
    "sapo, sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence", "top_entropy_quantile": 0.4},
    "vespo": {"loss_type": "vespo", "top_entropy_quantile": 0.4, "off_policy_mask_threshold": 0.01},
    "cispo, no KL": {"loss_type": "cispo", "epsilon_high": 2.0, "top_entropy_quantile": 0.3, "beta": 0.0},
    "grpo, sequence, no KL": {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.3, "beta": 0.0},
    "the bonus": {"loss_type": "dapo", **WITH},
    "the bonus on few tokens": {"loss_type": "bnpo", "top_entropy_quantile": 0.3, "beta": 0.0, **WITH},
    "the bonus beside vespo": {"loss_type": "vespo", **WITH},
}


class Exact(NamedTuple):
    """(B, T) float64, of a whole update."""

    logps: torch.Tensor
    entropy: torch.Tensor


def exact_scores(model, rollout) -> Exact:
    rows, entropies = [], []
    for prompt, completion in zip(rollout.batch.prompt_ids, rollout.batch.completion_ids):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        full = torch.log_softmax(logits, -1)
        rows.append(full.gather(1, torch.tensor(completion)[:, None])[:, 0])
        entropies.append(-(full.exp() * full).sum(-1))
    return Exact(*(torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, entropies)))


def expected_loss(model, reference, old_model, rollout, args, correction):
    """The whole update's, from the definitions and full logits."""
    now = exact_scores(model, rollout)
    with torch.no_grad():
        ref, old = exact_scores(reference, rollout).logps, exact_scores(old_model, rollout).logps
    lengths = torch.tensor([len(ids) for ids in rollout.batch.completion_ids])
    mask = torch.arange(now.logps.shape[1]) < lengths[:, None]
    advantages, n = rollout.advantages.values.double(), mask.sum()
    sampled = pad_right(rollout.batch.sampling_per_token_logps, mask.shape[1], 0.0).double()
    o = Objective(**{name: getattr(args, name) for name in vars(Objective())})
    ratio = ((old - sampled) * mask).exp().clamp(LOW, HIGH) if correction else None
    factor = torch.ones_like(now.logps)
    if o.loss_type == "vespo":
        factor = factor * vespo_weight(advantages, now.logps - old, mask, o, ratio)
    elif correction:
        factor = factor * ratio
    if o.off_policy_mask_threshold is not None:
        factor = factor * off_policy_mask(advantages, now.logps, old, mask, o.off_policy_mask_threshold)
    acted = mask
    if o.top_entropy_quantile < 1:
        acted = mask & (now.entropy >= now.entropy[mask].quantile(1 - o.top_entropy_quantile))
        factor = factor * acted
    weights = {"grpo": mask / lengths[:, None] / len(mask), "luspo": mask / len(mask)}
    weights["sapo"] = weights["grpo"]
    weights = weights.get(o.loss_type, mask / n)
    ref = ref if o.beta else None
    loss = grpo_loss(now.logps, old, ref, advantages, mask, weights, o, factor=factor).loss
    policy_loss = float(loss.detach())
    if args.entropy_bonus:
        loss = loss - COEF * (now.entropy * acted).sum() / acted.sum()
    return loss, policy_loss, factor[mask]


@pytest.mark.parametrize("name", SETTINGS)
def test_plain_steps_however_they_are_cut(config, dataset, tokenizer, model, name):
    compare(config, dataset, tokenizer, model, SETTINGS[name], cuts=(8, 3, 1))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
@pytest.mark.parametrize("name", ["cispo", "sapo, sequence", "vespo", "the bonus on few tokens"])
def test_fused_steps(config, dataset, tokenizer, model, name):
    compare(config, dataset, tokenizer, model, SETTINGS[name], cuts=(4,), fused_loss="on")


@pytest.mark.parametrize("name", ["vespo", "luspo, sequence"])
def test_of_another_sampler(config, dataset, tokenizer, model, name):
    settings = {**SETTINGS[name], "off_policy_mask_threshold": None}
    compare(config, dataset, tokenizer, model, settings, cuts=(8, 3), correction=True)


def compare(config, dataset, tokenizer, model, settings, *, cuts, fused_loss="off", correction=False):
    model.generation_config.eos_token_id = [1, *range(30, 41)]
    rollout, start = None, copy.deepcopy(model)
    for rows in cuts:
        args = config(
            **{"temperature": TEMPERATURE, "beta": BETA, **settings}, per_device_train_batch_size=rows,
            num_iterations=2, workspace_mib=1, fused_loss=fused_loss,
        )  # fmt: skip
        trainer = GRPOTrainer(
            copy.deepcopy(start), digit_share, args, dataset, processing_class=tokenizer, peft_config=LORA,
            observer=Quiet(),
        )  # fmt: skip
        trainer.learner.correction = Correction("token_truncate", LOW, HIGH) if correction else None
        reference = copy.deepcopy(trainer.model).double().eval()
        move(trainer.model, 3)
        if rollout is None:
            rollout = drifted(trainer.collect([dataset[i] for i in (1, 3)], 0))
        updates = trainer._learnable(rollout)
        old_model = copy.deepcopy(trainer.model).double().eval()
        move(trainer.model, 4)
        exact = copy.deepcopy(trainer.model).double().eval()
        expected, policy_loss, factor = expected_loss(exact, reference, old_model, rollout, args, correction)
        expected.backward()
        # Everything that is asked for does something here.
        assert ("top_entropy_quantile" in settings) <= bool((factor == 0).any())
        trainer.model.train()
        loss = float(trainer._gradients(updates[0]))
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
        compared = 0
        for (name, mine), theirs in zip(trainer.model.named_parameters(), exact.parameters()):
            if mine.requires_grad:
                scale = theirs.grad.abs().max()
                # Short lists leave a little of the entropy's direction out.
                bound = 1e-3 if fused_loss == "on" and args.entropy_bonus else 3e-4
                assert (mine.grad.double() - theirs.grad).abs().max() <= bound * scale + 1e-7, name
                compared += bool(scale > 0)
        assert compared > 10
        trainer.metrics["train"].add_update(trainer._sums)
        if args.entropy_bonus:
            assert trainer.metrics["train"].take()["policy_loss"] == pytest.approx(policy_loss, rel=1e-4, abs=1e-6)


@torch.no_grad()
def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += torch.randn(p.shape, generator=generator) * 0.05


def test_a_rollout_that_serves_two_steps_weighs_its_tokens_alike(config, dataset, tokenizer, model):
    """dapo's denominator is that of the rollout (TRL's num_items_in_batch, rescaled), so the longer half pulls more."""
    model.generation_config.eos_token_id = [1, *range(30, 41)]
    batches = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    args = config(loss_type="dapo", **batches)
    trainer = GRPOTrainer(
        model, digit_share, args, dataset, processing_class=tokenizer, peft_config=LORA, observer=Quiet()
    )
    rows = [dataset[i] for i in range(trainer.plan.prompts_per_rollout)]
    first, second = trainer._learnable(trainer.collect(rows, 0))
    counts = [sum(int(micro.loss_mask.sum()) for micro in update) for update in (first, second)]
    assert counts[0] != counts[1]
    for micro in (*first, *second):
        weights = micro.weights[micro.loss_mask]
        torch.testing.assert_close(weights, torch.full_like(weights, 2 / sum(counts)))
    shares = {round(1 / float(x)) for update in (first, second) for micro in update for x in micro.token_share}
    assert shares == set(counts)
