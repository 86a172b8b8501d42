"""LoRA layers with a gradient in few launches: the numbers of peft's own, in every dtype and order."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from fused_models import IDS, Launches, four_bit, fused, states
from lowvram_grpo.kernels.layer.nf4_dense import dense_nf4
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from passes import GROUPS, adapted, assert_same, tiny, training_pass
from peft import LoraConfig
from torch import nn

from lowvram_grpo.policy import frozen_base
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps
from lowvram_grpo.policy.fused_lora import forget_copies, fuse_lora
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.policy.wrapper import unwrap


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "recomputed", "recomputed, reentrant"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text", "Phi3"])
def test_log_probs_and_gradients_are_those_of_peft(family, reentrant):
    model = adapted(tiny(family))
    plain = training_pass(model)
    fused(model)
    if reentrant is not None:
        checkpoint_activations(model, {"use_reentrant": reentrant})
    assert_same(plain, training_pass(model), rtol=1e-5)
    assert why_not(model) is None
    assert_same(plain, training_pass(model, group_sizes=GROUPS), rtol=1e-5)


def test_an_entry_of_a_gradient_is_right_to_float32():
    """Both against float64: no worse than twice peft's own error."""
    model = adapted(tiny("Qwen2")).eval()
    grads = lambda: torch.autograd.grad(
        unwrap(model)(IDS).logits.sin().sum(), [p for p in model.parameters() if p.requires_grad]
    )
    plain = grads()
    ours = (fused(model), grads())[1]
    model.double()
    forget_copies(model)
    for exact, a, b in zip(grads(), plain, ours):
        error, allowed = ((x.double() - exact).abs().max() for x in (b, a))
        assert error <= 2 * allowed + 1e-6 * exact.abs().max()


@pytest.mark.skipif(not (HAS_TRITON and interpreted()), reason="needs Triton's interpreter")
def test_four_bit_weights_made_dense_by_the_kernel(tmp_path, monkeypatch):
    model = adapted(four_bit(tmp_path))
    plain = training_pass(model)
    calls = []
    monkeypatch.setattr(frozen_base, "DENSE_ROWS", 3)
    monkeypatch.setattr(frozen_base, "dense_nf4", lambda *given: calls.append(1) or dense_nf4(*given))
    fuse_lora(model, nf4_kernel=True)
    assert_same(plain, training_pass(model), rtol=1e-5)
    assert len(calls) == 2 * 14 - 3  # forward and back, where nothing before the first q, k and v is trained
    with torch.no_grad(), model.disable_adapter():
        found = states(model)
        assert len(calls) == 3 * 14 - 3
        fuse_lora(model, nf4_kernel=False)
        torch.testing.assert_close(found, states(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_four_bit_bases_and_autocast(tmp_path, dtype, autocast):
    model = adapted(four_bit(tmp_path, dtype))
    checkpoint_activations(model)
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else nullcontext
    with context():
        plain = training_pass(model)
        fused(model)
        ours = training_pass(model)
    exact = dtype == torch.float32 and not autocast
    assert_same(plain, ours, rtol=1e-5 if exact else 0.15)  # a network of bfloat16 is that far from itself
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_bfloat16_is_no_further_from_float32_than_peft(tmp_path):
    model = adapted(tiny("Llama"))
    exact = training_pass(model)
    unwrap(model).bfloat16()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = training_pass(model)
        fused(model)
        ours = training_pass(model)
    error = lambda found: sum(float((found[1][n] - g).square().sum()) for n, g in exact[1].items())
    assert error(ours) <= 1.5 * error(plain)


def test_adapters_of_one_pass_are_copied_once_and_siblings_share_their_products():
    model = fused(adapted(tiny("Llama")))
    checkpoint_activations(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), Launches() as seen:
            training_pass(model)
    layers = 2
    assert seen.names.count("_foreach_copy_") == 1 + layers * 4  # all at once, and each group's with its recomputation
    # z of q/k/v, o, gate/up and down, twice, and what each of the seven layers adds, twice; and back: dz of each, what
    # siblings add to their dx, and what dz A adds to each of the four.
    assert seen.names.count("addmm_") == layers * (2 * (4 + 7) + 7 + 3 + 4)


def test_the_first_sibling_computes_for_all_and_nothing_is_left_behind():
    model = fused(adapted(tiny("Llama")))
    attention = unwrap(model).model.layers[0].self_attn
    x = torch.randn(1, 5, 32)
    with Launches() as seen:
        attention.q_proj(x)
        first = len(seen.names)
        attention.k_proj(x), attention.v_proj(x)
    assert len(seen.names) == first
    cache = attention.q_proj._fused_lora_place[0].cache
    assert cache._outputs == {} and cache._x is None
    with torch.no_grad():
        attention.q_proj(x)
    gone = weakref.ref(cache._outputs[1])
    del x
    assert gone() is None  # no answer outlives its question


@pytest.mark.parametrize("graph", [False, True])
def test_siblings_that_read_different_tensors(graph):
    model = adapted(tiny("Llama"))
    attention = unwrap(model).model.layers[0].self_attn
    x, other = (torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
    ask = lambda: [
        layer(given) for layer, given in zip((attention.q_proj, attention.k_proj, attention.v_proj), (x, other, x))
    ]
    expected = [y.detach() for y in ask()]
    fused(model)
    with torch.set_grad_enabled(graph):
        for _ in range(2):
            torch.testing.assert_close([y.detach() for y in ask()], expected, rtol=1e-5, atol=1e-6)


def test_changed_weights_count_from_the_next_pass_on(tmp_path):
    model = adapted(tiny("Llama"))
    with torch.autocast("cpu", torch.bfloat16):
        fused(model)
        states(model)
        for p in model.parameters():
            if p.requires_grad:
                p.data.copy_(torch.randn(p.shape) * 0.2)  # as an optimizer's own kernel does: no version is counted
        found = states(model)
        forget_copies(model)
        assert torch.equal(states(model), found)
        layer = unwrap(model).model.layers[0].mlp.down_proj
        x = torch.randn(1, 3, 48)
        before = layer(x)
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(2)
        assert not torch.equal(layer(x), before)  # outside of a pass


def test_copies_are_gone_when_the_gradients_are_there():
    model = fused(adapted(tiny("Llama")))
    checkpoint_activations(model)
    cache = model.base_model.model.model.layers[0].mlp.down_proj._fused_lora_place[0].cache
    with torch.autocast("cpu", torch.bfloat16):
        states(model)
        assert len(cache._buffers) == 2 * (4 + 7)
        training_pass(model)
    assert not cache._made and not cache._buffers


def test_ranks_and_scalings_of_siblings_may_differ():
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", exclude_modules=["lm_head"], use_rslora=True,
        rank_pattern={"k_proj": 3, "up_proj": 1}, alpha_pattern={"v_proj": 11},
    )  # fmt: skip
    model = attach_lora(tiny("Qwen2"), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    plain = training_pass(model)
    assert_same(plain, training_pass(fused(model)), rtol=1e-5)


def test_tiles_and_gradients_that_accumulate():
    model = adapted(tiny("Llama"))
    checkpoint_activations(model)
    plain = training_pass(model)
    fused(model)
    tile_mlps(model, 7)
    assert_same(plain, training_pass(model), rtol=1e-4)
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad = lambda set_to_none=True: None
    second = training_pass(model)[1]
    for name, grad in second.items():
        torch.testing.assert_close(grad, 2 * first[name], rtol=1e-4, atol=1e-5)
