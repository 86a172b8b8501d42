"""GRPOTrainer with streamed weights: whole steps are those of resident ones, bit for bit."""

from __future__ import annotations

import pytest
import torch
from conftest import Quiet, digit_share, make_model, make_tokenizer
from peft import LoraConfig

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy import window
from lowvram_grpo.policy.load import bitsandbytes_config
from lowvram_grpo.policy.weight_stream import stream_of
from lowvram_grpo.training.trainer import GRPOTrainer

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("deep")
    make_model(**SIZES).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return str(place)


def trainer_of(folder, config, dataset, *, quantization="none", **settings):
    args = config(gradient_checkpointing=True, **settings)
    peft = LoraConfig(r=4, target_modules="all-linear")
    return GRPOTrainer(
        folder, digit_share, args, dataset, peft_config=peft, observer=Quiet(),
        quantization_config=bitsandbytes_config(quantization, torch.float32),
    )  # fmt: skip


def trained(folder, config, dataset, **settings):
    trainer = trainer_of(folder, config, dataset, **settings)
    trainer.train()
    history = [{k: v for k, v in row.items() if "time" not in k and "second" not in k and "runtime" not in k}
               for row in trainer.state.log_history]  # fmt: skip
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}, history, trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "nf4", "beta": 0.05},
        {"num_iterations": 2, "per_device_train_batch_size": 4, "mlp_tile": 8, "activation_offload": True},
        {"quantization": "int8", "memory_probe": "on", "beta": 0.05, "sync_ref_model": True, "ref_model_sync_steps": 1},
    ],
    ids=["nf4", "tiles", "int8"],
)
def test_two_steps_are_bit_for_bit_those_of_resident_weights(folder, config, dataset, settings):
    expected, history, _ = trained(folder, config, dataset, **settings)
    for count in ("auto", 3):
        weights, rows, trainer = trained(folder, config, dataset, weight_offload=count, **settings)
        assert len(stream_of(trainer.model).layers) == (5 if count == "auto" else 3)
        assert any("wait in host memory" in said for said in trainer.observer.said)
        assert rows == history
        for name, weight in expected.items():
            assert torch.equal(weights[name], weight), name


def test_a_copy_that_fails_takes_a_rung_and_the_step_is_right(folder, config, dataset, monkeypatch):
    settings = {"quantization": "nf4", "beta": 0.05}
    expected, *_ = trained(folder, config, dataset, **settings)
    fetch, seen = window.Window._fetch, {"rollout": 5, "forward": 2, "backward": 2}
    trainer = trainer_of(folder, config, dataset, weight_offload="auto", **settings)
    trainer.guard.active = True

    def failing(self, i):
        phase = trainer.guard._phase
        if self._held[i % 2] != i and phase in seen:
            seen[phase] -= 1
            if seen[phase] == 0:
                self._held[i % 2] = None
                self.slots[i % 2].data.fill_(0xFF)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        fetch(self, i)

    monkeypatch.setattr(window.Window, "_fetch", failing)
    trainer.train()
    assert {event.phase for event in trainer.guard.events} == {"rollout", "forward", "backward"}
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_what_it_needs_is_said_in_one_sentence(folder, config, dataset):
    with pytest.raises(UserError, match="gradient_checkpointing"):
        config(weight_offload="auto", gradient_checkpointing=False)
    with pytest.raises(UserError, match="peft_config"):
        GRPOTrainer(folder, digit_share, config(gradient_checkpointing=True, weight_offload=2), dataset)


def test_a_checkpoint_holds_the_adapter_and_goes_on(folder, config, dataset):
    settings = {"quantization": "nf4", "weight_offload": "auto", "save_strategy": "steps", "save_steps": 1}
    expected, *_ = trained(folder, config, dataset, **settings)
    trainer = trainer_of(folder, config, dataset, **settings)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, expected[name]), name
