"""sync_ref_model (TR-DPO, arXiv:2404.09656): after N syncs the reference is alpha sum_k (1 - alpha)^(N - k) policy_k +
(1 - alpha)^N ref_0, whatever is trained, however often the run was cut off, and at TRL's own moments."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from lowvram_grpo import GRPOTrainer

ALPHA, EVERY = 0.3, 2


def lora(**settings):
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


def trained_before(dtype=torch.float32):
    """A PeftModel whose adapter says something already."""
    model = get_peft_model(make_model(), lora(), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator) * 0.1
    return model.to(dtype)


# What is trained -> (model, peft_config, settings)
TRAINED = {
    "fresh adapter": lambda: (make_model(), lora(), {}),
    "trained adapter": lambda: (trained_before(), None, {}),
    "trained adapter in bfloat16": lambda: (trained_before(torch.bfloat16), None, {}),
    "DoRA": lambda: (make_model(), lora(use_dora=True), {}),
    "rsLoRA": lambda: (make_model(), lora(use_rslora=True), {}),
    "modules_to_save": lambda: (make_model(), lora(modules_to_save=["norm"]), {}),
    "all weights": lambda: (make_model(), None, {}),
    "all weights, streamed": lambda: (make_model(), None, {"reference_offload": True}),
    "all weights in bfloat16": lambda: (make_model().to(torch.bfloat16), None, {}),
    "all weights in bfloat16, streamed": lambda: (make_model().to(torch.bfloat16), None, {"reference_offload": True}),
}


class Watch(TrainerCallback):
    """Policies at the moments of a sync, by step."""

    def __init__(self):
        self.policies: dict[int, list[torch.Tensor]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0:
            self.policies[state.global_step] = [policy for _, policy in pairs(self.trainer)]


def pairs(trainer):
    return [(a.detach().double().clone(), b.detach().double().clone()) for a, b in trainer.reference._pairs()]


def run(what, config, dataset, tokenizer, *, resume=None, callbacks=(), **settings):
    model, peft_config, more = TRAINED[what]()
    args = config(**{
        "sync_ref_model": True, "ref_model_mixup_alpha": ALPHA, "ref_model_sync_steps": EVERY, "max_steps": 6,
        "beta": 0.1, "save_strategy": "steps", "save_steps": 1, **more, **settings,
    })  # fmt: skip
    watch = Watch()
    trainer = GRPOTrainer(
        model, digit_share, args, dataset, processing_class=tokenizer, peft_config=peft_config, observer=Quiet(),
        callbacks=[watch, *callbacks],
    )  # fmt: skip
    watch.trainer = trainer
    start = [reference for reference, _ in pairs(trainer)]
    trainer.train(resume_from_checkpoint=resume)
    return trainer, start, watch.policies


def closed_form(start, policies):
    n = len(policies)
    mixed = [(1 - ALPHA) ** n * x for x in start]
    for k, (_, policy) in enumerate(sorted(policies.items()), 1):
        mixed = [x + ALPHA * (1 - ALPHA) ** (n - k) * p for x, p in zip(mixed, policy)]
    return mixed


@pytest.mark.parametrize("what", TRAINED)
def test_the_closed_form_and_a_run_that_was_cut_off(what, config, dataset, tokenizer, tmp_path):
    whole, start, policies = run(what, config, dataset, tokenizer, output_dir=str(tmp_path / "a"))
    assert sorted(policies) == [2, 4, 6]  # the last step's too
    found, expected = pairs(whole), closed_form(start, policies)
    half = any(p.dtype == torch.bfloat16 for p, _ in whole.reference._pairs())
    exact = [m.double() for m in whole.reference.state().values()]
    assert len(expected) == len(found) == len(exact) and len(expected) > (20 if "adapter" in what else 10)
    for (reference, policy), mean, mixed, first in zip(found, exact, expected, start):
        torch.testing.assert_close(mean, mixed, rtol=1e-6, atol=1e-7)
        # What computes is the mean, rounded once.
        torch.testing.assert_close(reference, mixed, rtol=2**-8 if half else 1e-6, atol=1e-7)
        assert not torch.equal(policy, first)
    # Cut off between two syncs, and right after one, which must not be done again.
    for step in (3, 4):
        rest, _, _ = run(
            what, config, dataset, tokenizer, output_dir=str(tmp_path / "b"),
            resume=str(tmp_path / "a" / f"checkpoint-{step}"),
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(rest.reference.state().values(), whole.reference.state().values()))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(pairs(rest), found))
        for row, again in zip(whole.state.log_history[step:6], rest.state.log_history[step:6]):
            assert (row["step"], row["kl"], row["loss"]) == (again["step"], again["kl"], again["loss"])


@pytest.mark.parametrize("sharing", [{}, {"num_iterations": 2}], ids=["a rollout a step", "two steps a rollout"])
def test_as_trl_lets_it_follow(config, dataset, tokenizer, sharing, tmp_path):
    """TRL's own callback moves a copy of its own in the same run."""
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    theirs = callbacks.SyncRefModelCallback(ref_model=make_model().requires_grad_(False), accelerator=None)
    trainer, _, _ = run(
        "all weights", config, dataset, tokenizer, callbacks=[theirs], max_steps=5, save_strategy="no", **sharing
    )
    moved = dict(theirs.ref_model.named_parameters())
    assert moved.keys() == dict(trainer.reference.model.named_parameters()).keys()
    for name, p in trainer.reference.model.named_parameters():
        torch.testing.assert_close(p, moved[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(p, make_model().get_parameter(name))


def test_small_steps_are_not_lost_in_16_bits():
    """alpha (policy - reference) is below half of bfloat16's last place: alone in bfloat16 nothing would move."""
    from lowvram_grpo.policy.reference import Reference

    model = make_model().to(torch.bfloat16)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for offload in (False, True):
        reference = Reference(copy.deepcopy(model), offload=offload)
        with torch.no_grad():
            for p in reference._model.parameters():
                p *= 1.25
        for _ in range(400):
            reference.sync(0.001)
        share = 1 - 0.999**400
        for name, p in reference.model.named_parameters():
            expected = start[name].double() * (1 - share) + reference._model.get_parameter(name).double() * share
            torch.testing.assert_close(p.double(), expected, rtol=2**-8, atol=0)
            lost = start[name].clone()
            for _ in range(400):
                lost.lerp_(reference._model.get_parameter(name).detach(), 0.001)
            assert (lost.double() - expected).abs().mean() > 2 * (p.double() - expected).abs().mean()


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"sync_ref_model": True, "ref_model_sync_steps": 1}])
def test_streamed_or_not_a_run_is_the_same(settings, config, dataset, tokenizer, tmp_path):
    rows = []
    for offload in (False, True):
        trainer = GRPOTrainer(
            make_model(), digit_share, config(beta=0.04, max_steps=3, reference_offload=offload, **settings), dataset,
            processing_class=tokenizer, observer=Quiet(),
        )  # fmt: skip
        trainer.train()
        assert trainer.reference.offloaded is offload
        timed = ("step_time", "tokens_per_second", "train_runtime", "memory")
        rows.append([{k: v for k, v in row.items() if not k.startswith(timed)} for row in trainer.state.log_history])
        rows[-1].append([p.detach().clone() for p in trainer.model.parameters()])
    plain, streamed = rows
    assert len(plain) > 3 and plain[2]["kl"] > 0
    assert [r for r in plain[:3]] == [r for r in streamed[:3]]
    assert all(torch.equal(a, b) for a, b in zip(plain[-1], streamed[-1]))


@pytest.mark.parametrize("first", [False, True])
def test_a_resumed_run_may_keep_its_reference_elsewhere(first, config, dataset, tokenizer, tmp_path):
    """A checkpoint does not say where the reference was."""
    whole, _, _ = run(
        "all weights", config, dataset, tokenizer, output_dir=str(tmp_path / "a"), reference_offload=first
    )
    rest, _, _ = run(
        "all weights", config, dataset, tokenizer, output_dir=str(tmp_path / "b"), reference_offload=not first,
        resume=str(tmp_path / "a" / "checkpoint-3"),
    )  # fmt: skip
    assert rest.reference.offloaded is not first
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(pairs(rest), pairs(whole)))


@pytest.mark.parametrize("phase", ["score", "rollout", "optimizer"])
def test_a_full_card_moves_the_reference_away_and_redoes_the_step(phase, config, dataset, tokenizer):
    """The first rung there is; nothing but the place of the reference changes, so every number is the same."""

    def trained(spoil):
        args = config(beta=0.1, max_steps=3, signal_check=False, self_test=False)
        trainer = GRPOTrainer(
            make_model(), digit_share, args, dataset, processing_class=tokenizer, observer=Quiet()
        )  # fmt: skip
        trainer.guard.active = True
        if spoil:
            _spoil(trainer, phase)
        trainer.train()
        return trainer

    plain, survived = trained(False), trained(True)
    assert [str(event.rung) for event in survived.guard.events] == ["reference_offload=true"]
    assert survived.reference.offloaded and survived.grpo_args.reference_offload
    assert any("streamed from host memory" in text for text in survived.observer.said)
    for a, b in zip(plain.model.parameters(), survived.model.parameters()):
        assert torch.equal(a, b)


def _spoil(trainer, phase):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    owner, name = {
        "score": (trainer.learner, "score"),
        "rollout": (trainer.collector.engine, "generate"),
        "optimizer": (trainer, "create_optimizer"),
    }[phase]
    inner = getattr(owner, name)

    def spoiled(*args, **kwargs):
        if phase == "optimizer":
            optimizer, guarded = inner(*args, **kwargs), trainer.guard._step
            step = guarded._step

            def stepped(closure=None):
                step(closure)
                if not trainer.reference.offloaded:  # weights and moments have moved already
                    raise full

            guarded._step = stepped
            return optimizer
        found = inner(*args, **kwargs)
        if not trainer.reference.offloaded and (phase != "score" or not torch.is_grad_enabled()):
            raise full
        return found

    setattr(owner, name, spoiled)
