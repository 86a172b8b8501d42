"""Layers whose activations leave float16's range, in the ways that Gemma's do: the residual stream, or inside MLPs."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from test_decode import check_logps, sampling

from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps
from lowvram_grpo.policy.overflow import LIMIT, is_wide, keep, keep_where_needed, wide_layers
from lowvram_grpo.policy.training_ops import fewer_launches
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.support import why_not

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17]]


def gemma(kind=None, layers=5):
    """A tiny Gemma 3; `kind`: what of layer 2 is large, its contribution to the stream (until layer 3 takes it back) or
    gate times up in its MLP."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, initializer_range=0.3, query_pre_attn_scalar=8,
        layer_types=(["sliding_attention", "full_attention"] * layers)[:layers], max_position_embeddings=128,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        if kind == "stream":
            # The norm behind the MLP makes numbers of one in size, times its weight.
            model.model.layers[2].post_feedforward_layernorm.weight.fill_(6e4)
        elif kind == "mlp":
            model.model.layers[2].mlp.up_proj.weight.mul_(3e4)
    return model


def half(model):
    """float16, with the numbers of a float32 model that are float16's."""
    model.load_state_dict({name: x.half().float() for name, x in model.state_dict().items()})
    return copy.deepcopy(model).half()


def with_lora(model):
    from peft import LoraConfig

    torch.manual_seed(1)
    model = attach_lora(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model


def logps(model, ids=PROMPTS[0]):
    with torch.no_grad():
        return unwrap(model)(input_ids=torch.tensor([ids])).logits.float().log_softmax(-1)


@pytest.mark.parametrize("kind,kept", [("stream", [2, 3, 4]), ("mlp", [2])])
def test_what_overflows_is_kept_in_float32_and_said(kind, kept):
    exact = gemma(kind)
    model, said = half(exact), []
    assert not logps(model).isfinite().all()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes, state = [m.training for m in model.train().modules()], torch.get_rng_state()
    assert keep_where_needed(model, PROMPTS, nullcontext, said.append) == kept == wide_layers(model)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    model.eval()
    torch.testing.assert_close(logps(model), logps(exact), atol=0.02, rtol=0)
    assert logps(model).isfinite().all()
    (sentence,) = said
    layers = "3 decoder layers of 5 (2-4)" if kind == "stream" else "1 decoder layer of 5 (2)"
    assert f"activations of {layers} reach" in sentence and "float16 ends at 65504" in sentence
    # Weights keep their numbers, those of other layers their dtype too.
    after = model.state_dict()
    wide = tuple(f"model.layers.{i}." for i in kept) + (("model.norm.",) if 4 in kept else ())
    assert after.keys() == before.keys()
    for name, x in before.items():
        dtype = torch.float32 if name.startswith(wide) else torch.float16
        assert after[name].dtype == dtype and torch.equal(after[name], x.to(dtype))
    # Asked again, there is nothing to say, and a copy computes the same.
    assert keep_where_needed(model, PROMPTS, nullcontext, said.append) == [] and len(said) == 1
    assert torch.equal(logps(copy.deepcopy(model)), logps(model))


def test_a_model_that_stays_in_range_is_not_touched():
    model = half(gemma())
    before, own = logps(model), [set(vars(m)) for m in model.modules()]
    assert keep_where_needed(model, PROMPTS, nullcontext, pytest.fail) == []
    assert torch.equal(logps(model), before) and [set(vars(m)) for m in model.modules()] == own


def test_layers_that_are_not_kept_are_handed_float16():
    model, seen = half(gemma("mlp")), {}
    keep_where_needed(model, PROMPTS, nullcontext, lambda said: None)
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda m, args, i=i: seen.update({i: args[0].dtype}))
    assert logps(model).isfinite().all() and set(seen.values()) == {torch.float16}
    assert model(input_ids=torch.tensor([PROMPTS[0]])).logits.dtype == torch.float16


def test_half_of_the_range_is_too_much():
    """Other tokens may be twice as large."""
    model = half(gemma())
    with torch.no_grad():
        model.model.layers[1].post_feedforward_layernorm.weight.fill_(1.2e4)
    largest = float(
        model.model(input_ids=torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states[2].abs().max()
    )
    assert LIMIT < largest < 65504 and logps(model).isfinite().all()
    assert 1 in keep_where_needed(model, PROMPTS, nullcontext, lambda said: None)


@pytest.mark.parametrize("kind", ["stream", "mlp"])
@pytest.mark.parametrize("fused", ["on", "off"])
def test_gradients_are_those_of_float32(kind, fused):
    def grads(model, scale, keep):
        checkpoint_activations(model, None)
        tile_mlps(model, 3)
        fewer_launches(model, fused, None)
        if keep:  # as in a run: of the model as it was built
            keep_where_needed(model, PROMPTS, nullcontext, lambda said: None)
        model.train()
        ids = torch.tensor([PROMPTS[0]])
        loss = unwrap(model)(input_ids=ids).logits.float().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).mean()
        (loss * scale).backward()
        return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}

    exact = gemma(kind)
    model = half(exact)
    exact, model = with_lora(exact), with_lora(model)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    expected, found = grads(exact, 1.0, keep=False), grads(model, 128.0, keep=True)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 0.05 * grad.norm() + 1e-4, name


@pytest.mark.parametrize("kind", ["stream", "mlp"])
@pytest.mark.parametrize("adapters", ["fused", "off"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_sampler_is_the_scorer(kind, adapters, autocast):
    """Greedy rollouts of prompts of several lengths, rows refilled: ids of the float32 model, log-probs of a pass."""
    exact = gemma(kind)
    model = half(exact)
    exact, model = with_lora(exact), with_lora(model)
    context = lambda: torch.autocast("cpu", torch.float16, enabled=autocast)
    at = sampling(max_new_tokens=8, eos_ids=(1,))
    keep_where_needed(model, PROMPTS, context, lambda said: None)
    with context():
        assert why_not(unwrap(model)) is None
        for rows in (None, 2):
            batch = RolloutEngine(model, at, rows, adapters=adapters).generate(PROMPTS, 2, seed=0)
            assert all(x.isfinite().all() for x in batch.sampling_per_token_logps)
            check_logps(model, batch, atol=0.02)
    check_logps(exact, batch, atol=0.05)


def test_4_bit_weights_are_multiplied_in_float32(tmp_path):
    pytest.importorskip("bitsandbytes")
    from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm

    half(gemma("mlp")).save_pretrained(tmp_path)
    config = bitsandbytes_config("nf4", torch.float16)
    load = lambda dtype, quantized: load_causal_lm(
        str(tmp_path), device=torch.device("cpu"), dtype=dtype, quantization_config=quantized
    )
    model, stored = load(torch.float16, config), {}
    assert not logps(model).isfinite().all()
    stored = {
        n: (m.weight.data.clone(), m.weight.dtype) for n, m in model.named_modules() if hasattr(m, "compute_dtype")
    }
    assert keep_where_needed(model, PROMPTS, nullcontext, lambda said: None) == [2]
    assert logps(model).isfinite().all()
    wide = {is_wide(m): m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")}
    assert wide == {True: torch.float32, False: torch.float16}
    for name, (data, dtype) in stored.items():
        weight = model.get_submodule(name).weight
        assert weight.dtype == dtype and torch.equal(weight.data, data)
    exact = load(torch.float32, bitsandbytes_config("nf4", torch.float32))
    torch.testing.assert_close(logps(model), logps(exact), atol=0.05, rtol=0)


def test_layers_are_kept_by_number():
    model = half(gemma("mlp"))
    keep(model, [2])
    other = half(gemma("mlp"))
    keep_where_needed(other, PROMPTS, nullcontext, lambda said: None)
    assert torch.equal(logps(model), logps(other))
