"""GRPO steps on the masked card: every preset's settings, every saver, and a card that is full in every phase."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from lowvram_grpo.recipe import preset
from tests.masked_cuda.record import RECORD
from tests.masked_cuda.scenarios import HALF, full_in_training, of_preset, trained

# In 4 bits and in 16; the others differ from these in the size of batches alone.
OFTEN = ("8gb", "24gb")
PRESETS = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.full)
    for name in preset.names()
    if preset.load(name).vram_gib
]
COMPARED = ("loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length")


def assert_same_numbers(found, expected):
    """Of float32 on both: the device's path through attention, sweep and loss sums in another order, and 8-bit moments
    round what it leaves to one of 256 steps; a draw that fell otherwise would differ in the first digit."""
    assert len(found.rows) == len(expected.rows) > 1
    for a, b in zip(found.rows, expected.rows):
        for name in COMPARED:
            if name in b:
                assert math.isclose(a[name], b[name], rel_tol=2e-3, abs_tol=2e-5), (name, a[name], b[name])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_as_on_the_cpu(name):
    settings = {**of_preset(name), "steps": 2}
    assert_same_numbers(trained(**settings), trained(on="cpu", **settings))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_in_16_bits(name):
    """Under autocast, with a GradScaler in float16 (which skips steps until its scale is low enough)."""
    found = trained(**of_preset(name), dtype=HALF, steps=2)
    assert len(found.rows) == 2 and all(math.isfinite(row["loss"]) for row in found.rows)
    assert max(row["sampling/sampling_logp_difference/max"] for row in found.rows) < 0.3
    assert all(w.isfinite().all() for w in found.weights.values())


SAVERS = {
    "everything in host memory": {
        "quantization": "nf4", "head_dtype": "int8", "embedding_offload": True, "activation_offload": True,
        "optimizer_offload": True, "gradient_checkpointing": True, "mlp_tile": 8, "optim": "adamw_torch",
    },
    "nf4 head, int8 keys": {
        "quantization": "nf4", "head_dtype": "nf4", "kv_cache_dtype": "int8", "gradient_checkpointing": True,
    },
    "without a shared prefix": {"shared_prefix": "off", "kl_estimator": "exact"},
    "all weights": {"lora": False},
    "all weights, a streamed reference": {"lora": False, "reference_offload": True, "sync_ref_model": True,
                                          "ref_model_sync_steps": 1, "steps": 3},
    "all weights and a streamed reference, tied": {"lora": False, "reference_offload": True, "num_iterations": 2,
                                                   "model": {"tie_word_embeddings": True, "num_hidden_layers": 5}},
    "two uses of a rollout": {"num_iterations": 2, "steps": 3, "rollout_batch_size": 3},
    "filters": {"top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "temperature": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", SAVERS)
def test_a_saver_trains_as_on_the_cpu(name):
    assert_same_numbers(trained(**SAVERS[name]), trained(on="cpu", **SAVERS[name]))


NOT_SHOWN = {
    "LLM.int8": "it waits for the device in bitsandbytes' own CUDA code, which no mask sees",
    "peaks of memory": "what is held now is counted, not what an operator or a library holds meanwhile",
    "races between streams": "operators run one after another, whatever stream they are on",
    "compiled arithmetic": "kernels run in the interpreter or by their reference; the compile gate builds them",
}


@pytest.mark.parametrize("what", NOT_SHOWN)
def test_what_only_a_card_can_show(what):
    pytest.skip(NOT_SHOWN[what])


@cache
def undisturbed(settings):
    """Weights of a run that no phase was full in."""
    return trained(**dict(settings)).weights


@pytest.mark.parametrize(
    "phase,after",
    [("rollout", 30), ("capture", 20), ("score", 20), ("forward", 60), ("backward", 40), ("optimizer", 3)],
)
def test_a_card_that_is_full_once_steps_down_and_goes_on(phase, after):
    settings = {
        "quantization": "nf4", "gradient_checkpointing": True, "num_iterations": 2, "memory_probe": "off",
        "self_test": False, "signal_check": False, "optim": "adamw_torch",
    }  # fmt: skip
    plain, (before, hits) = undisturbed(tuple(settings.items())), full_in_training(phase, after)
    survived = trained(**settings, before=before)
    assert len(hits) == 1, f"no operator number {after} in the {phase} phase"
    events = survived.trainer.guard.events
    assert [event.phase for event in events] == ["rollout" if phase == "capture" else phase]
    assert RECORD.debug == 0 and RECORD.capturing is None
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for name, weight in plain.items():
        torch.testing.assert_close(survived.weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_the_memory_probe_runs_before_step_1():
    found = trained(quantization="nf4", head_dtype="int8", memory_probe="on", steps=2)
    assert any("memory probe" in text for text in found.trainer.observer.said)
