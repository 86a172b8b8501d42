"""The savers of the training pass on the device: streams, page-locked memory, the attention kernels of CUDA."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from conftest import make_model
from peft import LoraConfig

from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.training.scoring import score

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Long copies, which would show a stream that does not wait; tests/masked_cuda, on a CPU, has no streams.
MASKED = "MASKED_CC" in os.environ
LAYERS, HIDDEN, PROMPT, COMPLETION, GROUP = (3, 128, 64, 192, 4) if MASKED else (8, 256, 128, 384, 4)


@pytest.fixture
def model():
    base = make_model(
        hidden_size=HIDDEN, intermediate_size=1024, num_hidden_layers=LAYERS, max_position_embeddings=1024,
        initializer_range=0.05,
    )  # fmt: skip
    model = attach_lora(base.cuda(), LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += (torch.randn(p.shape, generator=generator) * 0.05).to(p.device)
    checkpoint_activations(model)
    assert why_not(model) is None
    return model.train()


def one_pass(model, **kwargs):
    """(logps, gradients, bytes held between the passes beyond those before)."""
    generator = torch.Generator().manual_seed(1)
    ids = lambda *shape: torch.randint(3, 41, shape, generator=generator).cuda()
    lengths = [COMPLETION - COMPLETION // 8 * i for i in range(GROUP)]
    mask = (torch.arange(COMPLETION) < torch.tensor(lengths)[:, None]).long().cuda()
    prompt = ids(1, PROMPT).expand(GROUP, -1)
    batch = prompt, torch.ones_like(prompt), ids(GROUP, COMPLETION), mask
    model.zero_grad(set_to_none=True)
    gc.collect()  # models of earlier tests, which may go at any time
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = score(
        model, *batch, temperature=0.9, workspace_mib=8, prompt_lengths=[PROMPT] * GROUP, completion_lengths=lengths,
        **kwargs,
    )  # fmt: skip
    held = torch.cuda.memory_allocated() - before
    (out.logps * torch.linspace(-1, 1, COMPLETION, device="cuda")).sum().backward()
    return out.logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, held


@pytest.mark.parametrize(
    "savers", [{"group_sizes": [GROUP]}, {"offload": True}, {"tile": 100}, {"group_sizes": [GROUP], "offload": True}]
)
def test_log_probs_and_gradients_stay_the_same(model, savers):
    logps, gradients, _ = one_pass(model)
    savers = dict(savers)
    if "tile" in savers:
        tile_mlps(model, savers.pop("tile"))
    for _ in range(3):  # the second and third time through memory that was used before
        again, theirs, _ = one_pass(model, **savers)
        torch.testing.assert_close(again, logps, rtol=1e-3, atol=1e-3)
        for name, gradient in gradients.items():
            scale = float(gradient.abs().max())
            assert float((theirs[name] - gradient).abs().max()) <= 5e-3 * scale + 1e-6, name


def test_offloaded_layer_inputs_are_not_held_between_the_passes(model):
    one_pass(model, offload=True)
    held = one_pass(model)[2] - one_pass(model, offload=True)[2]
    assert held >= 0.9 * LAYERS * GROUP * (PROMPT + COMPLETION) * HIDDEN * 4
