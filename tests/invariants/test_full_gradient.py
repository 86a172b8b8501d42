"""The whole step, model included, against a naive float64 one with full logits: loss and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import digit_share
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
TEMPERATURE, BETA, EPSILON = 0.8, 0.1, 0.2


def naive_logps(model, prompt, completion):
    """(T,) float64 from one unpadded sequence and the model's own logits."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def naive_loss(model, reference, rollout, old, loss_type, masked, t_max):
    batch, terms, lengths = rollout.batch, [], []
    for i, (prompt, completion) in enumerate(zip(batch.prompt_ids, batch.completion_ids)):
        logp, a = naive_logps(model, prompt, completion), rollout.advantages.values[i].double()
        with torch.no_grad():
            ref = naive_logps(reference, prompt, completion)
        ratio = torch.exp(logp - (logp.detach() if old is None else old[i]))
        d = ref - logp
        token = -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a) + BETA * ratio * (d.exp() - d - 1)
        counts = 0 if masked and batch.truncated[i] else len(completion)
        terms.append(token[:counts].sum())
        lengths.append(counts)
    B = len(terms)
    if loss_type == "grpo":
        return sum(t / max(n, 1) for t, n in zip(terms, lengths)) / B
    if loss_type == "dr_grpo":
        return sum(terms) / (B * t_max)
    return sum(terms) / max(sum(lengths), 1)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("peft_config", [LORA, None], ids=["lora", "all-weights"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
def test_loss_and_every_gradient(config, dataset, tokenizer, model, loss_type, peft_config, masked, off_policy):
    args = config(
        loss_type=loss_type, temperature=TEMPERATURE, beta=BETA, epsilon=EPSILON, mask_truncated_completions=masked,
        per_device_train_batch_size=3, workspace_mib=1, gradient_checkpointing=True,
        num_iterations=2 if off_policy else 1,
    )  # fmt: skip
    model.generation_config.eos_token_id = [1, *range(30, 41)]
    trainer = GRPOTrainer(model, digit_share, args, dataset, processing_class=tokenizer, peft_config=peft_config)
    reference = copy.deepcopy(trainer.model).double().eval()
    rollout = trainer.collect([dataset[i] for i in (1, 3)], 0)
    assert any(rollout.batch.truncated) and not all(rollout.batch.truncated)
    updates, old = trainer._learnable(rollout)[0], None
    generator = torch.Generator().manual_seed(3)
    if off_policy:
        exact = copy.deepcopy(trainer.model).double().eval()
        with torch.no_grad():
            old = [naive_logps(exact, p, c) for p, c in zip(rollout.batch.prompt_ids, rollout.batch.completion_ids)]
    with torch.no_grad():  # away from the reference, and from the policy that sampled
        for p in trainer.model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator) * 0.05
    exact = copy.deepcopy(trainer.model).double().eval()
    expected = naive_loss(exact, reference, rollout, old, loss_type, masked, args.max_completion_length)
    expected.backward()

    trainer.model.train()
    trainer._sums = type("Ignore", (), {"add": lambda *a: None})()
    loss = 0.0
    for micro in updates:
        part = trainer.compute_loss(trainer.model, micro)
        part.backward()
        loss += float(part.detach())
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    compared = 0
    for (name, mine), theirs in zip(trainer.model.named_parameters(), exact.parameters()):
        if mine.requires_grad:
            scale = theirs.grad.abs().max()
            assert (mine.grad.double() - theirs.grad).abs().max() <= 2e-4 * scale + 1e-7, name
            compared += bool(scale > 0)
    assert compared > 10
