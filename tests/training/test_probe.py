"""The rehearsal before step 1 finds out what does not fit, and leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowvram_grpo.errors import is_out_of_memory
from lowvram_grpo.memory import guard as module
from lowvram_grpo.memory.devices import Device
from lowvram_grpo.memory.guard import Guard, cap
from lowvram_grpo.memory.ladder import Rung
from lowvram_grpo.training import parts
from lowvram_grpo.training.agents import agents_of
from tests.invariants.test_out_of_memory import full, trained

GIB = 2**30


def test_it_changes_nothing(config, dataset):
    without, _ = trained(config(), dataset)
    with_probe, trainer = trained(config(memory_probe="on"), dataset)
    assert not trainer.guard.events
    for name, value in without.items():
        assert torch.equal(value, with_probe[name]), name


def test_what_does_not_fit_is_known_before_step_1(config, dataset):
    """It sees the longest completions there can be, which the samples of a step may never be."""
    seen = []

    def spoil(trainer):
        inner, engine = trainer.learner.score, trainer.collector.engine
        rehearse = engine.rehearse

        def score(micro, *args, **kwargs):
            seen.append((trainer.state.global_step, micro.completion_ids.shape))
            if torch.is_grad_enabled() and micro.completion_ids.numel() > 12:
                raise full()
            return inner(micro, *args, **kwargs)

        def only_small_waves(prompt, completion, rows, *args, **kwargs):
            if rows > 4:
                raise full()
            return rehearse(prompt, completion, rows, *args, **kwargs)

        trainer.learner.score, engine.rehearse = score, only_small_waves

    _, trainer = trained(config(memory_probe="on", max_steps=1), dataset, spoil)
    assert [str(event.rung) for event in trainer.guard.events[:2]] == [
        "rollout_batch_size=4", "per_device_train_batch_size=4",
    ]  # fmt: skip
    assert seen[0] == (0, (8, 6))
    assert trainer.plan.micro_batch_size == 2 and trainer.collector.engine.rows == 4


def test_replies_are_rehearsed_where_tools_make_them(config):
    def double(x: int) -> int:
        """Twice as much.

        Args:
            x: of what.
        """
        return 2 * x

    for agents, expected in (
        (agents_of(None, None, None, None), False),
        (agents_of([double], None, None, None), True),
        (agents_of(None, None, lambda prompts: {}, None), False),  # which does not ask the engine
    ):
        engine = SimpleNamespace()
        parts.make_collector(engine, None, None, None, config(), None, agents)
        assert engine.converses == expected


@pytest.mark.parametrize("vram_gib", [None, 3.0])
def test_the_cap_is_what_is_ours(monkeypatch, vram_gib):
    there = Device("cuda", "a card", 0, 8 * GIB, 7 * GIB, (8, 9), True, "linux")
    asked = []
    monkeypatch.setattr(module, "detect", lambda index: there)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append(share))
    cap(torch.device("cuda", 0), vram_gib)
    assert asked[0] * 8 == pytest.approx(3.0 - 400 / 1024 if vram_gib else 7 - 128 / 1024)


def test_cpu_runs_have_no_cap(monkeypatch):
    monkeypatch.setattr(module, "detect", None)
    cap(torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("out of resource: shared memory, Required: 150000, Hardware limit: 101376."), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (MemoryError(), False),
    ],
)
def test_which_errors_are_the_devices(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_the_error_belongs_to_the_innermost_phase():
    taken = []
    guard = Guard(
        {"per_device_train_batch_size": 4, "rollout_batch_size": 1, "activation_offload": True, "mlp_tile": 8,
         "workspace_mib": 8, "optimizer_offload": True},
        lambda key, value: taken.append((key, value)),
        ladder=(Rung("per_device_train_batch_size", 3),),
        tell=lambda sentence, event: None,
        limits="",
    )  # fmt: skip
    attempts = []

    def work():
        attempts.append(1)
        with guard.phase("backward"):
            if len(attempts) < 3:
                raise full()
        return "done"

    undone = []
    assert guard.run("forward", work, lambda: undone.append(1)) == "done"
    assert [event.phase for event in guard.events] == ["backward", "backward"]
    assert taken == [("per_device_train_batch_size", 3), ("per_device_train_batch_size", 2)]
    assert len(undone) == 2


def test_a_rung_that_the_model_refuses_is_passed_over():
    from lowvram_grpo.errors import UserError

    def apply(key, value):
        if key == "mlp_tile":
            raise UserError("mlp_tile is set, but this is a mixture of experts")

    settings = {
        "per_device_train_batch_size": 1, "rollout_batch_size": 1, "gradient_checkpointing": True,
        "activation_offload": True, "mlp_tile": None,
        "workspace_mib": 64, "optimizer_offload": False,
    }  # fmt: skip
    guard = Guard(settings, apply, tell=lambda sentence, event: None, limits="")
    attempts = []

    def work():
        attempts.append(1)
        if len(attempts) < 2:
            raise full()

    guard.run("backward", work)
    assert [str(event.rung) for event in guard.events] == ["workspace_mib=32"]
    assert any("mlp_tile" in text for text in guard.refused)


def test_a_second_run_does_not_guard_the_step_twice(config, dataset):
    _, trainer = trained(config(max_steps=1), dataset)
    first = trainer.guard._step
    trainer.train()
    assert trainer.guard._step is first
