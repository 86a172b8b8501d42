"""Recurrences of Qwen3.5 and LFM2 by our functions: the same losses, gradients and greedy completions, and transformers
as it was afterwards."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import sys
import types
from contextlib import ExitStack

import pytest
import torch
from lowvram_grpo.kernels.recurrent import delta_step
from passes import adapted, assert_same, tiny, training_pass
from torch import nn
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.qwen3_5 import modeling_qwen3_5

from lowvram_grpo.policy import delta_rule, trials
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.delta_rule import give_recurrences, replace_recurrences
from lowvram_grpo.policy.small_ops import fast_modules
from lowvram_grpo.policy.training_ops import fewer_launches

SHAPES = {
    "Qwen3_5Text": {
        "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip
NAMES = {
    modeling_qwen3_5: ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    modeling_lfm2: ("causal_conv1d_fn", "causal_conv1d_update"),
}
IDS = torch.randint(3, 41, (2, 9), generator=torch.Generator().manual_seed(4))
# Before transformers 5.16 these were called otherwise.
pytestmark = pytest.mark.skipif(not hasattr(modeling_lfm2, "causal_conv1d_fn"), reason="another transformers")


def model_of(family):
    model = tiny(family, **SHAPES[family])
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False)


def standing():
    return [getattr(module, name) for module, names in NAMES.items() for name in names]


@pytest.fixture(autouse=True)
def put_back():
    """Models of other tests, and of failed ones, may live until they are collected."""
    gc.collect()
    before = standing()
    yield before
    gc.collect()
    assert standing() == before and not any(isinstance(x, delta_rule._StandsIn) for x in before)


@pytest.mark.parametrize("family,functions", [("Qwen3_5Text", 4), ("Lfm2", 2)])
def test_training_gives_the_same_losses_and_gradients(family, functions):
    model = adapted(model_of(family))
    plain = training_pass(model)
    assert give_recurrences(model, "on") == functions
    assert_same(plain, training_pass(model), rtol=1e-5)
    checkpoint_activations(model)
    assert_same(plain, training_pass(model), rtol=1e-5)


def greedy(model):
    return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("family", SHAPES)
def test_greedy_completions_are_the_same(family, monkeypatch):
    steps = []
    step = delta_step.gated_delta_step_ref
    monkeypatch.setattr(delta_step, "gated_delta_step_ref", lambda *a, **k: steps.append(1) or step(*a, **k))
    model = model_of(family)
    expected, original = greedy(model), standing()
    with fast_modules(model, "on"), torch.no_grad():
        assert torch.equal(greedy(model), expected)
        assert isinstance(modeling_qwen3_5.torch_chunk_gated_delta_rule, delta_rule._Chunked) == (family != "Lfm2")
    assert standing() == original
    assert len(steps) == (11 * 3 if family == "Qwen3_5Text" else 0)  # of three layers with the rule


def given(length=1, **kwargs):
    q, k, v = (torch.randn(2, length, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    return {"query": q, "key": k, "value": v, "g": -q[..., 0].abs(), "beta": k[..., 0].sigmoid(), **kwargs}


def test_only_rollouts_update_a_state_in_its_place():
    model = model_of("Qwen3_5Text")
    state = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    settings = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    rule = lambda state, **more: modeling_qwen3_5.torch_recurrent_gated_delta_rule(
        **given(initial_state=state, **settings, **more)
    )
    out, after = rule(state)
    give_recurrences(model, "on")
    with torch.no_grad():
        before = state.clone()
        torch.testing.assert_close(rule(state), (out, after))
        assert torch.equal(state, before)
        with fast_modules(model, "on"):
            expanded = state[:1].expand(2, -1, -1, -1)
            rule(expanded)  # whose rows are one: a copy is updated
            assert torch.equal(state, before)
            assert rule(state)[1] is state
            torch.testing.assert_close(state, after)
    with_gradient = state.requires_grad_()
    assert rule(with_gradient)[1].requires_grad


def test_what_our_functions_do_not_know_goes_to_the_originals():
    model = model_of("Qwen3_5Text")
    give_recurrences(model, "on")
    with pytest.raises(ValueError, match="packed"):
        modeling_qwen3_5.torch_chunk_gated_delta_rule(**given(9), cu_seqlens=torch.tensor([0, 9]))
    x, weight = torch.randn(1, 4, 6), nn.Parameter(torch.randn(4, 3))
    y = modeling_qwen3_5.causal_conv1d_fn(x, weight, activation="silu")  # a filter that is trained
    assert torch.autograd.grad(y.sum(), weight)[0].abs().sum() > 0
    assert modeling_qwen3_5.causal_conv1d_fn(x, weight.detach(), activation="gelu").shape == x.shape


def test_a_function_that_computes_something_else_is_left_alone(monkeypatch):
    def other(query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
              use_qk_l2norm_in_kernel=False, **kwargs):  # fmt: skip
        out, state = original(
            query, key, value, g, 2 * beta, chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel
        )
        return out, state

    original = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", other)
    assert give_recurrences(model_of("Qwen3_5Text"), "on") == 3
    assert modeling_qwen3_5.torch_chunk_gated_delta_rule is other


def test_kernels_of_other_packages_stay(monkeypatch):
    """transformers says in a closure whether flash-linear-attention is behind a function; the hub's `kernels` makes a
    module of it."""
    own = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)

    def wrapper_of(is_new_implementation):
        def wrapped(*args, **kwargs):
            assert not is_new_implementation
            return own(*args, **kwargs)

        wrapped.__wrapped__ = own
        return wrapped

    def module_of(func):
        class Func(nn.Module):
            def forward(self, *args, **kwargs):
                return func(*args, **kwargs)

        return Func()

    assert delta_rule._own(wrapper_of(True)) is None
    assert delta_rule._own(wrapper_of(False)) is own
    assert delta_rule._own(module_of(wrapper_of(False))) is own
    assert delta_rule._own(module_of(wrapper_of(True))) is None
    exchanged = module_of(wrapper_of(False))
    exchanged.forward = lambda *args: None
    assert delta_rule._own(exchanged) is None
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", wrapper_of(True))
    assert give_recurrences(model_of("Qwen3_5Text"), "on") == 3


def test_layers_that_hold_their_functions_as_transformers_5_10_has_them():
    """Their file has `torch_causal_conv1d_update`, and each layer its functions as attributes."""
    file = types.ModuleType("an_older_file")
    own = inspect.unwrap
    file.torch_chunk_gated_delta_rule = own(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    file.torch_causal_conv1d_update = own(modeling_qwen3_5.causal_conv1d_update)
    exec(
        "from torch import nn\n"
        "class Layer(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = nn.Parameter(__import__('torch').zeros(1))\n"
        "        self.chunk_gated_delta_rule = torch_chunk_gated_delta_rule\n"
        "        self.causal_conv1d_update = torch_causal_conv1d_update\n"
        "    def forward(self, x):\n"
        "        return self.chunk_gated_delta_rule(x)\n",
        vars(file),
    )
    file.Layer.__module__ = file.__name__
    sys.modules[file.__name__] = file
    try:
        model = nn.Sequential(file.Layer(), file.Layer())
        with ExitStack() as undo:
            assert replace_recurrences(model, "on", undo) == 2
            assert isinstance(model[1].chunk_gated_delta_rule, delta_rule._Chunked)
        assert all(m.chunk_gated_delta_rule is file.torch_chunk_gated_delta_rule for m in model)
        assert give_recurrences(model, "on") == 2
        held = model[0].chunk_gated_delta_rule
        assert isinstance(held, delta_rule._Chunked) and file.torch_chunk_gated_delta_rule is held
        assert copy.deepcopy(model)[0].chunk_gated_delta_rule is held
        assert pickle.loads(pickle.dumps(held)) is held
        torch.testing.assert_close(held(**given(9))[0], held.original(**given(9))[0])
    finally:
        del sys.modules[file.__name__]


def test_two_models_of_one_family(put_back):
    first, second = model_of("Qwen3_5Text"), model_of("Qwen3_5Text")
    give_recurrences(first, "auto")
    ours = modeling_qwen3_5.torch_chunk_gated_delta_rule
    give_recurrences(second, "on")
    assert modeling_qwen3_5.torch_chunk_gated_delta_rule is ours and ours.users["training"] == 2
    del first
    gc.collect()
    assert modeling_qwen3_5.torch_chunk_gated_delta_rule is ours
    with fast_modules(second, "on"):
        del second
        gc.collect()
    # The last user is gone: put_back looks.


def test_auto_takes_the_rule_over_sequences_everywhere_and_the_rest_on_a_gpu(monkeypatch):
    model = model_of("Qwen3_5Text")
    fewer_launches(model, "auto", None)
    kinds = [type(getattr(modeling_qwen3_5, name)).__name__ for name in (*NAMES[modeling_qwen3_5], "causal_conv1d_fn")]
    assert kinds == ["_Chunked", "function", "function"]
    assert give_recurrences(model, "off") == 0
    assert give_recurrences(model_of("Qwen3_5Text").to("meta"), "auto") == 1
    assert {"delta_rule", "delta_rule_grad", "delta_step", "short_conv", "short_conv_grad"} <= set(
        trials.EXPECTED_FASTER
    )
    # A card on which kernels fail their trial computes the rule in PyTorch, and nothing else by us.
    monkeypatch.setattr(delta_rule, "passes_trial", lambda *args: False)
    other = model_of("Qwen3_5Text")
    assert give_recurrences(other, "on") == 1
    assert modeling_qwen3_5.torch_chunk_gated_delta_rule.path == "torch"


@pytest.mark.parametrize("kind", ["delta_rule", "delta_rule_grad", "delta_step", "short_conv", "short_conv_grad"])
def test_trials_compare_the_same_things(kind):
    """On a CPU, PyTorch with PyTorch: numbers are finite, as many, and near."""
    found, expected = trials.TRIALS[kind](trials.random_numbers(3, 4, 5, 64).half())
    assert found.isfinite().all() and found.abs().mean() > 0.01
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)
