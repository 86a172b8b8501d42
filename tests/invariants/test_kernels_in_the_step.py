"""The training step with the kernels in it: the same gradient by Triton and by PyTorch, the exact KL, skipped work."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Quiet, digit_share
from lowvram_grpo.kernels.runtime import HAS_TRITON
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer, UserError

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_for(model, args, dataset, tokenizer, reward=digit_share, peft_config=LORA):
    return GRPOTrainer(
        model, reward, args, dataset, processing_class=tokenizer, peft_config=peft_config, observer=Quiet()
    )


def step(trainer, rows, seed=3):
    """Gradients and metrics of one step away from the reference."""
    generator = torch.Generator().manual_seed(seed)
    trainer.create_optimizer()
    trainer.pending_rollout = trainer.collect(rows, 0)
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator) * 0.05
    trainer.metrics["train"].take()
    trainer.training_step(trainer.model, rows)
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return grads, trainer.metrics["train"].take()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
@pytest.mark.parametrize("estimator", ["k3", "exact"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_fused_and_plain_steps_agree(config, dataset, tokenizer, model, estimator, level, iterations):
    rows = [dataset[i] for i in (1, 3)]
    found = []
    for fused in ("on", "off"):
        args = config(
            fused_loss=fused, kl_estimator=estimator, importance_sampling_level=level, beta=0.1,
            per_device_train_batch_size=3, num_iterations=iterations, workspace_mib=1,
        )  # fmt: skip
        trainer = trainer_for(copy.deepcopy(model), args, dataset, tokenizer)
        assert trainer.learner.kernels.fused == (fused == "on")
        found.append(step(trainer, rows))
    (fused, its), (plain, theirs) = found
    assert fused.keys() == plain.keys() and len(plain) > 10
    for name, grad in plain.items():
        assert (fused[name] - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-7, name
    assert {n for n in its if not n.startswith("sweep/")} == {n for n in theirs if not n.startswith("sweep/")}
    for name in {n for n in its if not n.startswith("sweep/")} - {"step_time", "tokens_per_second"}:
        assert its[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_exact_kl_is_that_of_the_whole_vocabulary(config, dataset, tokenizer, model):
    """Metric and gradient against full logits in float64; advantages are 0, so the KL is all there is."""
    flat = lambda completions, **kwargs: [1.0] * len(completions)
    args = config(kl_estimator="exact", beta=0.5, temperature=0.8, per_device_train_batch_size=3)
    trainer = trainer_for(model, args, dataset, tokenizer, reward=flat)
    reference = copy.deepcopy(trainer.model).double().eval()
    rows = [dataset[i] for i in (1, 3)]
    grads, metrics = step(trainer, rows)
    policy = copy.deepcopy(trainer.model).double().eval()
    rollout = trainer._updates[0]
    completions = sum(len(micro.prompt_ids) for micro in rollout)
    total = tokens = 0
    for micro in rollout:
        for i in range(len(micro.prompt_ids)):
            prompt = micro.prompt_ids[i][micro.prompt_mask[i].bool()]
            completion = micro.completion_ids[i][micro.completion_mask[i].bool()]
            ids = torch.cat([prompt, completion])[None]
            full = lambda m: torch.log_softmax(m(ids).logits[0, len(prompt) - 1 : -1] / 0.8, -1)  # noqa: B023
            logp = full(policy)
            with torch.no_grad():
                ref = full(reference)
            kl = (logp.exp() * (logp - ref)).sum(-1)
            total = total + kl.sum() / len(completion) / completions
            tokens += len(completion)
    (0.5 * total).backward()
    assert metrics["kl"] > 1e-3
    expected = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    compared = 0
    for name, grad in grads.items():
        scale = expected[name].abs().max()
        assert (grad.double() - expected[name]).abs().max() <= 2e-3 * scale + 1e-7, name
        compared += bool(scale > 0)
    assert compared > 5


def test_exact_kl_of_a_policy_to_itself_is_zero(config, dataset, tokenizer, model):
    trainer = trainer_for(model, config(kl_estimator="exact", max_steps=2), dataset, tokenizer)
    trainer.train()
    first, second = (row["kl"] for row in trainer.state.log_history if "loss" in row)
    assert abs(first) < 1e-6 < second


def test_exact_kl_needs_a_shared_head(config, dataset, tokenizer, model):
    with pytest.raises(UserError, match="peft_config"):
        trainer_for(model, config(kl_estimator="exact"), dataset, tokenizer, peft_config=None)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_dead_micro_batches_cost_no_backward_and_change_nothing(config, dataset, tokenizer, model, beta):
    """One of two groups is dead. Without a KL its two micro-batches need no gradient; with one they do."""
    by_prompt = lambda prompts, completions, **kwargs: [
        0.5 if p == prompts[0] else s for p, s in zip(prompts, digit_share(completions))
    ]
    rows = [dataset[i] for i in (1, 3)]
    found, passes = [], []
    for skip in (True, False):
        args = config(beta=beta, per_device_train_batch_size=2)
        trainer = trainer_for(copy.deepcopy(model), args, dataset, tokenizer, reward=by_prompt)
        backward, calls = trainer.accelerator.backward, []
        trainer.accelerator.backward = lambda loss: (calls.append(1), backward(loss))  # noqa: B023
        with pytest.MonkeyPatch.context() as patch:
            if not skip:
                everything = lambda micro, *_: torch.ones_like(micro.weights, dtype=torch.bool)
                patch.setattr("lowvram_grpo.training.learner.wanted_rows", everything)
            found.append(step(trainer, rows))
        passes.append(len(calls))
    assert passes == ([2, 4] if beta == 0 else [4, 4])
    (some, its), (every, theirs) = found
    for name, grad in every.items():
        assert (some[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-8, name
    assert its["entropy"] == pytest.approx(theirs["entropy"], rel=1e-6)


def test_a_wholly_dead_update_still_moves_the_optimizer_by_its_momentum(config, dataset, tokenizer, model):
    flat = lambda completions, **kwargs: [1.0] * len(completions)
    trainer = trainer_for(model, config(beta=0.0, per_device_train_batch_size=2), dataset, tokenizer, reward=flat)
    grads, _ = step(trainer, [dataset[i] for i in (1, 3)])
    assert grads and all(not g.any() for g in grads.values())


def test_fused_loss_on_without_a_gpu_says_so(config, dataset, tokenizer, model, monkeypatch):
    monkeypatch.setattr("lowvram_grpo.training.loss.interpreted", lambda: False)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="fused_loss is on"):
        trainer_for(model, config(fused_loss="on"), dataset, tokenizer)
