"""Memory runs out in each phase: the step ends with the gradients it would have had, and says what it gave up."""

from __future__ import annotations

import json

import pytest
import torch

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.errors import UserError
from lowvram_grpo.run.metrics import MetricsWriter
from tests.conftest import Quiet, digit_share, make_model, make_tokenizer


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def trained(args, dataset, spoil=None, tmp_path=None):
    """(adapter after training, trainer); `spoil(trainer)` plants the failure."""
    trainer = GRPOTrainer(
        make_model(),
        digit_share,
        args,
        dataset,
        processing_class=make_tokenizer(),
        peft_config=lora(),
        observer=Quiet(),
    )
    trainer.guard.active = True
    if tmp_path is not None:
        trainer.add_callback(MetricsWriter(tmp_path / "metrics.jsonl"))
    if spoil is not None:
        spoil(trainer)
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}, trainer


def spoil_rollout(trainer):
    engine = trainer.collector.engine
    inner = engine.generate

    def generate(*args, **kwargs):
        if engine.rows is None or engine.rows > 2:
            raise full()
        return inner(*args, **kwargs)

    engine.generate = generate


def spoil_score(trainer):
    inner = trainer.learner.score

    def score(micro, *args, **kwargs):
        if not torch.is_grad_enabled() and len(micro.advantages) > 2:
            raise full()
        return inner(micro, *args, **kwargs)

    trainer.learner.score = score


def spoil_forward(trainer):
    inner, calls = trainer.learner.score, []

    def score(micro, *args, **kwargs):
        if torch.is_grad_enabled() and len(micro.advantages) > 1:
            calls.append(1)
            if len(calls) > 1:  # the gradient of the first micro-batch is there already
                raise full()
        return inner(micro, *args, **kwargs)

    trainer.learner.score = score


def spoil_backward(trainer):
    inner = trainer.accelerator.backward

    def backward(loss, **kwargs):
        inner(loss, **kwargs)
        if trainer.plan.micro_batch_size > 2:
            raise full()

    trainer.accelerator.backward = backward


def spoil_optimizer(trainer):
    made = trainer.create_optimizer

    def create(*args, **kwargs):
        optimizer = made(*args, **kwargs)
        guarded = trainer.guard._step
        inner = guarded._step

        def step(closure=None):
            inner(closure)
            if not guarded.offload:  # weights and moments have moved already
                raise full()

        guarded._step = step
        return optimizer

    trainer.create_optimizer = create


SPOILED = {
    "rollout": (spoil_rollout, "rollout_batch_size=2"),
    "score": (spoil_score, "per_device_train_batch_size=2"),
    "forward": (spoil_forward, "per_device_train_batch_size=1"),
    "backward": (spoil_backward, "per_device_train_batch_size=2"),
    "optimizer": (spoil_optimizer, "optimizer_offload=true"),
}


@pytest.mark.parametrize("phase", SPOILED)
def test_a_step_that_ran_out_of_memory_ends_the_same(config, dataset, tmp_path, phase):
    # Two passes over a rollout, so that there is a scoring phase; micro-batches of 3 do not divide its 8 completions.
    # Adam would turn a gradient that is 0 but for rounding into a full step.
    args = {"per_device_train_batch_size": 3, "num_iterations": 2, "max_steps": 3, "signal_check": False,
            "self_test": False, "optim": "adamw_torch" if phase == "optimizer" else "sgd"}  # fmt: skip
    plain, _ = trained(config(**args), dataset)
    spoil, rung = SPOILED[phase]
    survived, trainer = trained(config(**args), dataset, spoil, tmp_path)
    assert trainer.state.global_step == 3
    for name, value in plain.items():
        torch.testing.assert_close(survived[name], value, rtol=1e-4, atol=1e-6, msg=name)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    taken = [(row["memory/oom_phase"], row["memory/rung"]) for row in rows if "memory/rung" in row]
    assert taken[-1] == (phase, rung)
    assert any(phase in text and rung in text for text in trainer.observer.said)


# Means and thresholds over a whole update, and a coefficient that follows from one of them.
OF_THE_UPDATE = {
    "use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 2.77, "entropy_coef_delta": 0.04,
    "top_entropy_quantile": 0.4, "loss_type": "vespo",
}  # fmt: skip


@pytest.mark.parametrize("phase", ["score", "forward", "backward"])
@pytest.mark.parametrize("rows", [3, 8])  # a single micro-batch becomes several in the middle of the run
def test_what_is_of_the_whole_update_is_counted_once(config, dataset, phase, rows):
    args = {"per_device_train_batch_size": rows, "num_iterations": 2, "max_steps": 3, "signal_check": False,
            "self_test": False, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
            **OF_THE_UPDATE}  # fmt: skip
    plain, expected = trained(config(**args), dataset)
    survived, trainer = trained(config(**args), dataset, SPOILED[phase][0])
    assert trainer.guard.events
    for name, value in plain.items():
        torch.testing.assert_close(survived[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert trainer.learner.entropy.coef == expected.learner.entropy.coef
    assert trainer.learner.entropy.last_entropy == pytest.approx(expected.learner.entropy.last_entropy, rel=1e-4)
    logged = lambda t: [(row["entropy_coef"], row["policy_loss"]) for row in t.state.log_history if "loss" in row]
    assert len({coef for coef, _ in logged(expected)}) > 1
    for found, wanted in zip(logged(trainer), logged(expected), strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_recomputation_comes_back_in_the_middle_of_a_run(config, dataset, tmp_path):
    """What a plan that climbed has switched off, the guard can switch on."""

    def spoil(trainer):
        inner = trainer.accelerator.backward

        def backward(loss, **kwargs):
            inner(loss, **kwargs)
            if not trainer.grpo_args.gradient_checkpointing:
                raise full()

        trainer.accelerator.backward = backward

    args = {"per_device_train_batch_size": 1, "max_steps": 2, "optim": "sgd", "gradient_checkpointing": False}
    args |= {"signal_check": False, "self_test": False}
    plain, _ = trained(config(**args), dataset)
    survived, trainer = trained(config(**args), dataset, spoil, tmp_path)
    assert [str(event.rung) for event in trainer.guard.events] == ["gradient_checkpointing=true"]
    assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())
    for name, value in plain.items():
        torch.testing.assert_close(survived[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_when_no_rung_is_left_the_end_is_clear(config, dataset):
    def always(trainer):
        def generate(*args, **kwargs):
            raise full()

        trainer.collector.engine.generate = generate

    with pytest.raises(UserError, match=r"rollout phase.*2\.00 GiB.*no memory saver is left.*max_completion_length"):
        trained(config(), dataset, always)


def test_other_errors_pass(config, dataset):
    def broken(trainer):
        def generate(*args, **kwargs):
            raise RuntimeError("a bug")

        trainer.collector.engine.generate = generate

    with pytest.raises(RuntimeError, match="a bug"):
        trained(config(), dataset, broken)
