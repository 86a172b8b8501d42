"""GRPO steps of a tiny model on the device: autocast, GradScaler, the fused loss beside the page that defines it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from lowvram_grpo.kernels.runtime import interpreted
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(interpreted(), reason="needs compiled kernels: set TRITON_INTERPRET=0"),
]
USE_CPU = False


def train(config, dataset, tokenizer, steps=1, **settings):
    """(log rows, adapter weights before, after)."""
    args = config(use_cpu=USE_CPU, max_steps=steps, num_generations=8, **settings)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    # GRPOTrainer seeds before it attaches the adapter, so every call starts from the same one.
    trainer = GRPOTrainer(
        make_model(), digit_share, args, dataset, processing_class=tokenizer, observer=Quiet(), peft_config=lora
    )
    weights = lambda: {n: p.detach().float().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = weights()
    trainer.train()
    assert {p.device.type for p in trainer.model.parameters()} == {"cpu" if USE_CPU else "cuda"}
    return [row for row in trainer.state.log_history if "loss" in row], before, weights()


def assert_moved(before, after):
    assert all(w.isfinite().all() for w in after.values())
    assert any(not torch.equal(before[n], after[n]) for n in after)


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"loss_type": "cispo", "epsilon_high": 1.5, "entropy_coef": 0.02, "top_entropy_quantile": 0.5},
        {"loss_type": "sapo", "importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.001},
        {"loss_type": "vespo", "use_adaptive_entropy": True, "entropy_target": 5.0, "kl_estimator": "exact"},
    ],
    ids=["grpo", "cispo", "sapo", "vespo"],
)
def test_the_fused_loss_trains_as_the_eager_one(config, dataset, tokenizer, loss):
    # SGD, for Adam's first step is the sign of the gradient, whatever its size.
    settings = {"bf16": False, "optim": "sgd", "learning_rate": 1.0, "num_iterations": 2, **loss}
    rows, weights = [], []
    for mode in ("on", "off"):
        log, _, after = train(config, dataset, tokenizer, steps=2, fused_loss=mode, **settings)
        rows.append(log)
        weights.append(after)
    assert "reward" in rows[0][0]  # and not in the second row, whose step had no rollout of its own
    for a, b in zip(*rows):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "kl", "entropy", "reward", "clip_ratio/region_mean"}:
            assert math.isclose(a[name], b[name], rel_tol=1e-4, abs_tol=1e-6), name
    for name, w in weights[0].items():
        torch.testing.assert_close(w, weights[1][name], rtol=1e-4, atol=1e-6)


def test_a_step_under_bf16_autocast(config, dataset, tokenizer):
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no bfloat16")
    rows, before, after = train(config, dataset, tokenizer, steps=2, bf16=True)
    assert_moved(before, after)
    assert all(math.isfinite(row["loss"]) and row["sampling/sampling_logp_difference/max"] < 0.3 for row in rows)


def test_a_step_under_fp16_with_a_grad_scaler(config, dataset, tokenizer):
    """The scaler starts high and skips steps until it is low enough, so a few are needed."""
    rows, before, after = train(config, dataset, tokenizer, steps=6, bf16=False, fp16=True)
    assert_moved(before, after)
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_checkpointing_changes_nothing(config, dataset, tokenizer):
    found = [
        train(config, dataset, tokenizer, bf16=False, optim="sgd", learning_rate=1.0, gradient_checkpointing=on)[2]
        for on in (False, True)
    ]
    for name, w in found[0].items():
        torch.testing.assert_close(w, found[1][name], rtol=1e-4, atol=1e-6)
