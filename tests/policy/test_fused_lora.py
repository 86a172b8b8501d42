"""LoRA layers with a gradient in few launches: the numbers of peft's own, whatever is done to the adapters."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from contextlib import nullcontext

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from lowvram_grpo.kernels.nf4_dense import dense_nf4
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from passes import GROUPS, adapted, assert_same, micro_batch, tiny, training_pass
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy import frozen_base, fused_lora, lora_product
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps
from lowvram_grpo.policy.dropout import training_mode
from lowvram_grpo.policy.fused_lora import forget_copies, fuse_lora
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm
from lowvram_grpo.policy.own_forward import has_foreign_forward
from lowvram_grpo.policy.reference import Reference
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.policy.training_ops import fewer_launches
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapters import fast_adapters

IDS = torch.randint(3, 41, (2, 9), generator=torch.Generator().manual_seed(4))
# Widths that bitsandbytes' blocks fit into: its operator for CPUs takes the wrong scales where a block ends in another
# row than it begins in (0.50).
BIG = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def fused(model):
    assert fuse_lora(model, nf4_kernel=False) > 0
    return model


def states(model, **kwargs):
    with torch.no_grad():
        return unwrap(model).model(IDS, **kwargs).last_hidden_state


def four_bit(tmp_path, dtype=torch.float32):
    tiny("Llama", **BIG).save_pretrained(tmp_path)
    config = bitsandbytes_config("nf4", dtype)
    return load_causal_lm(str(tmp_path), device=torch.device("cpu"), dtype=dtype, quantization_config=config)


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


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


def test_switched_mixed_and_merged_adapters_are_peft_s(tmp_path):
    pair = [adapted(tiny("Llama")) for _ in range(2)]
    fused(pair[1])
    references = [Reference(model) for model in pair]
    assert references[0].kind == "frozen adapter"

    def agree():
        expected, found = map(states, pair)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return found

    start = agree()
    for model in pair:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".default." in name:
                    p.mul_(1.5)
    assert not torch.allclose(agree(), start, atol=1e-3)
    with references[0].active(), references[1].active():
        torch.testing.assert_close(agree(), start, rtol=1e-4, atol=1e-5)
    for reference in references:
        reference.sync(0.5)
    with references[0].active(), references[1].active():
        agree()
    for model in pair:
        model.base_model.set_adapter(["default", "reference"])
    agree()  # both at once
    for model in pair:
        model.set_adapter("default")
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 0.3)
    agree()
    with pair[0].disable_adapter(), pair[1].disable_adapter():
        agree()
        for model in pair:  # a graph through the base alone
            model.train()
        found = [
            torch.autograd.grad(model(inputs_embeds=(x := torch.ones(1, 4, 32, requires_grad=True))).logits.sum(), x)[0]
            for model in pair
        ]
        torch.testing.assert_close(*found)
    for model in pair:
        model.eval().merge_adapter()
    agree()
    for model in pair:
        model.unmerge_adapter()
    agree()
    torch.testing.assert_close(*(states(model.merge_and_unload()) for model in pair), rtol=1e-4, atol=1e-5)


def test_what_is_saved_and_what_is_copied():
    model, other = adapted(tiny("Llama")), fused(adapted(tiny("Llama")))
    assert model.state_dict().keys() == other.state_dict().keys()
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(other).keys()
    expected = states(other)
    twin = copy.deepcopy(other)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert torch.equal(states(twin), expected) and not torch.equal(states(other), expected)
    fused(twin), fused(twin)
    assert (
        sum(isinstance(h.__self__, fused_lora._PassCache) for h in unwrap(twin).model._forward_pre_hooks.values()) == 1
    )
    assert torch.equal(states(twin), expected)


def test_a_model_that_is_gone_is_gone():
    model = fused(adapted(tiny("Llama")))
    states(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_rollouts_come_on_top():
    model = fused(adapted(tiny("Llama")))
    expected, own = states(model), [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
    for mode in ("fused", "merged", "off"):
        with torch.no_grad(), fast_adapters(model, mode):
            now = [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
            assert len(now) == len(own) == 14 and (mode == "off" or not set(now) & set(own))
            torch.testing.assert_close(states(model), expected, rtol=1e-4, atol=1e-5)
        assert own == [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
    torch.testing.assert_close(states(model), expected)
    cache = model.base_model.model.model.layers[0].mlp.down_proj._fused_lora_place[0].cache
    assert cache._made
    with torch.no_grad(), fast_adapters(model, "fused"):
        assert not cache._made  # a rollout has copies of its own


def test_copies_are_gone_when_the_gradients_are_there():
    model = fused(adapted(tiny("Llama")))
    checkpoint_activations(model)
    cache = model.base_model.model.model.layers[0].mlp.down_proj._fused_lora_place[0].cache
    with torch.autocast("cpu", torch.bfloat16):
        states(model)
        assert len(cache._buffers) == 2 * (4 + 7)
        training_pass(model)
    assert not cache._made and not cache._buffers


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_other_adapters_go_peft_s_own_way(settings, monkeypatch):
    model = attach_lora(
        tiny("Llama"), LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"], **settings)
    )
    for module in (fused_lora, lora_product):
        monkeypatch.setattr(module, "lora_products", None)
    fuse_lora(model.train(), nf4_kernel=False)
    torch.manual_seed(3)
    found = training_pass(model)[1]
    assert found and all(g.isfinite().all() for g in found.values())


def test_dropout_in_force_and_not():
    model = attach_lora(
        tiny("Llama"), LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"], lora_dropout=0.5)
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    plain = states(model.eval())
    fused(model.eval())
    torch.testing.assert_close(states(model), plain, rtol=1e-4, atol=1e-5)
    training_mode(model)
    assert not torch.allclose(states(model), states(model), atol=1e-3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # policy.dropout.disable_dropout
    torch.testing.assert_close(states(model), plain, rtol=1e-4, atol=1e-5)


def test_a_base_that_is_trained_or_watched_is_left_alone():
    model = adapted(tiny("Llama"))
    layers = unwrap(model).model.layers
    layers[0].mlp.down_proj.base_layer.weight.requires_grad_(True)
    layers[1].mlp.down_proj.base_layer.register_forward_hook(lambda module, args, out: out * 2)
    layers[0].self_attn.o_proj.forward = layers[0].self_attn.o_proj.forward  # accelerate's hooks
    assert fuse_lora(model, nf4_kernel=False) == 14 - 3


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


def test_no_phase_holds_more_than_before():
    def peaks(fuse):
        with torch.device("meta"):
            model = adapted(tiny("Llama", hidden_size=256, intermediate_size=640, num_hidden_layers=4))
        checkpoint_activations(model)
        if fuse:
            fused(model)
        batch = micro_batch([64] * 4, [64] * 4, [4], device="meta")
        with Ledger() as ledger:
            why_not(model)
            with ledger.phase("pass"):
                training_pass(model, batch, prompt_lengths=[64] * 4, completion_lengths=[64] * 4, group_sizes=[4])
        return ledger.phases["pass"].bytes

    assert peaks(True) <= peaks(False)


@pytest.mark.parametrize("tiled", [False, True])
def test_a_model_can_be_pickled(tiled):
    model = adapted(tiny("Llama"))
    if tiled:
        tile_mlps(model, 4)
    fewer_launches(model, "on", None)
    expected, kept = states(model), io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    assert torch.equal(states(torch.load(kept, weights_only=False)), expected)


def test_a_pass_in_inference_mode_leaves_nothing_that_others_can_not_use():
    model = fused(adapted(tiny("Llama")))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            unwrap(model)(IDS)
        training_pass(model)


def test_hooks_that_come_later_are_called():
    """Of the base's, the factors' and the layer's own, forwards and backwards."""
    plain, model = adapted(tiny("Llama")), fused(adapted(tiny("Llama")))
    found = []
    for each in (plain, model):
        layer, seen = unwrap(each).model.layers[1].self_attn, []
        layer.q_proj.base_layer.register_full_backward_hook(lambda *_, seen=seen: seen.append("base"))
        layer.k_proj.lora_A["default"].register_forward_hook(lambda *_, seen=seen: seen.append("A"))
        layer.v_proj.lora_B["default"].register_forward_hook(lambda module, args, out: 2 * out)
        layer.o_proj.register_full_backward_hook(lambda *_, seen=seen: seen.append("layer"))
        each.requires_grad_(False).get_input_embeddings().weight.requires_grad_()
        found.append((unwrap(each)(IDS).logits, seen))
        found[-1][0].square().sum().backward()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    assert found[0][1] == found[1][1] == ["A", "layer", "base"]


def test_who_wraps_a_forward_of_ours_is_somebody_else():
    model = adapted(tiny("Llama"))
    fewer_launches(model, "on", None)
    norm = unwrap(model).model.norm
    assert not has_foreign_forward(norm)
    add_hook_to_module(norm, ModelHook())
    assert has_foreign_forward(norm)
