"""Norms, gates and rotary positions of training by kernels: the same gradients, and the model otherwise as it was."""

from __future__ import annotations

import copy
import gc
import sys

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from lowvram_grpo.kernels.layer import gradients as layer_gradients
from lowvram_grpo.kernels.layer import ops as layer_ops
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from models import LISTED, build
from passes import adapted, assert_same, tiny, training_pass
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.policy import small_ops, training_ops, trials
from lowvram_grpo.policy.checkpointing import checkpoint_activations, tile_mlps, untile_mlps
from lowvram_grpo.policy.small_ops import differentiable_modules, fast_modules
from lowvram_grpo.policy.training_ops import fewer_launches
from tests.policy.test_small_ops import COUNTS, IDS, functions, shaken

in_triton = pytest.mark.skipif(not (HAS_TRITON and interpreted()), reason="needs Triton's interpreter")
BACK = ("rms_norm_back", "swiglu_back", "rope_back")


@pytest.fixture
def kernels(monkeypatch):
    """Triton kernels, by the interpreter; counts those of backward passes."""
    monkeypatch.setattr(layer_ops, "uses_triton", lambda *tensors: True)
    calls = dict.fromkeys(BACK, 0)
    for name in calls:
        launch = getattr(layer_gradients, f"{name}_triton")

        def counted(*args, name=name, launch=launch):
            calls[name] += 1
            return launch(*args)

        monkeypatch.setattr(layer_gradients, f"{name}_triton", counted)
    return calls


def input_gradient(model):
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=x).logits
    return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


@in_triton
@pytest.mark.parametrize("kind,extra", [x for x in LISTED if x[0] in ("Qwen3", "Gemma2", "Phi", "Phi3")])
def test_kernels_give_the_same_gradients(kind, extra, kernels):
    model = shaken(build(kind, **extra)).requires_grad_(False)
    expected = input_gradient(model)
    before = functions(model)
    assert tuple(differentiable_modules(model, "on").values()) == COUNTS[kind]
    for found, exact in zip(input_gradient(model), expected):
        assert (found - exact).abs().max() <= 5e-5 * exact.abs().max()
    assert tuple(kernels.values()) == (COUNTS[kind][0], COUNTS[kind][1], 2 * COUNTS[kind][2])
    places = [sys.modules[type(m).__module__] for m in model.modules() if type(m).__name__.endswith("Attention")]
    del model
    gc.collect()
    assert not places or [getattr(places[0], "apply_rotary_pos_emb", None)] == (before or [None])


def test_without_a_gpu_too():
    model = adapted(tiny("Gemma3Text"))
    plain = training_pass(model)
    assert differentiable_modules(model, "on") == {"rms_norm": 13, "swiglu": 2, "rope": 1}
    checkpoint_activations(model)
    assert_same(plain, training_pass(model), rtol=1e-5)
    tile_mlps(model, 7)
    assert_same(plain, training_pass(model))
    untile_mlps(model)
    assert "_differentiable_mlp" in str(vars(model.base_model.model.model.layers[0].mlp)["forward"])
    assert_same(plain, training_pass(model), rtol=1e-5)


def test_trained_norms_take_their_own_way():
    model = shaken(build("Qwen3"))
    run = lambda: torch.autograd.grad(model(IDS).logits.square().sum(), list(model.parameters()))
    expected = run()
    differentiable_modules(model, "on")
    for a, b in zip(run(), expected):
        assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())


def test_copies_run_on_their_own_weights_and_what_is_saved_is_the_same():
    model = shaken(build("Llama"))
    names = list(model.state_dict())
    differentiable_modules(model, "on")
    twin = copy.deepcopy(model)
    expected = twin(IDS).logits
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    assert torch.equal(twin(IDS).logits, expected)
    assert list(model.state_dict()) == names == list(twin.state_dict())


def test_a_rollout_comes_on_top_and_goes_again():
    model = shaken(build("Qwen2"))
    with torch.no_grad():
        expected = model(IDS).logits
    first, before = build("Qwen2"), functions(model)
    differentiable_modules(model, "on")
    own = [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
    with fast_modules(model, "on") as counts, fast_modules(first, "on"):
        assert tuple(counts.values()) == COUNTS["Qwen2"]
        assert not set(own) & {vars(m)["forward"] for m in model.modules() if "forward" in vars(m)}
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected)
    assert own == [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
    (rope,) = functions(model)
    assert rope.users["training"] == 1 and [rope.original] == before
    del model, own
    gc.collect()
    assert functions(first) == before


def test_auto_takes_them_where_they_run_on_a_card(monkeypatch):
    model = build("Llama")
    assert not any(differentiable_modules(model, "auto").values())  # on a CPU
    assert not any(differentiable_modules(model, "off").values())
    asked = []
    monkeypatch.setattr(small_ops, "passes_trial", lambda *given: asked.append(given) or given[0] != "swiglu_grad")
    parameters = type(model).parameters
    card = lambda self: (_OnCard(p) for p in parameters(self))
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "parameters", card)
        assert small_ops._kinds(model, "auto", torch.bfloat16, "_grad") == ["rms_norm", "rope"]
    assert {dtype for _, _, dtype in asked} == {torch.float32, torch.bfloat16}


class _OnCard:
    def __init__(self, p):
        self.device, self.dtype, self.is_floating_point = torch.device("cuda", 0), p.dtype, p.is_floating_point


@in_triton
def test_the_question_whether_a_kernel_runs_has_right_and_wrong_answers(monkeypatch, kernels):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(trials, "random_numbers", lambda *shape: _Sent(torch.randn(shape)))
    kinds = ["rms_norm_grad", "swiglu_grad", "rope_grad", "nf4_dense"]
    trials.passes_trial.cache_clear()
    assert all(trials.passes_trial(kind, card, torch.float32) for kind in kinds) and all(kernels.values())
    trials.passes_trial.cache_clear()
    monkeypatch.setattr(layer_gradients, "rms_norm_back_triton", lambda dy, x, *_: dy)
    monkeypatch.setattr(layer_gradients, "swiglu_back_triton", None)
    monkeypatch.setattr(layer_gradients, "rope_back_triton", lambda dq, dk, cos, sin, q, k: (q.copy_(dq), k.copy_(dk)))
    monkeypatch.setattr(trials, "dense_nf4", lambda packed, state, dtype: torch.zeros(state.shape))
    assert not any(trials.passes_trial(kind, card, torch.float32) for kind in kinds)
    trials.passes_trial.cache_clear()


class _Sent:
    """Random numbers that stay on the CPU wherever they are sent."""

    def __init__(self, x):
        self.x = x

    def to(self, device, dtype):
        return self.x.to(dtype)


def test_off_is_the_models_and_peft_s_own_code():
    model = adapted(make_model())
    fewer_launches(model, "off", None)
    assert not any("forward" in vars(m) for m in model.modules())
    fewer_launches(model, "auto", None)
    assert sum("forward" in vars(m) for m in model.modules()) == 14


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "all weights"])
def test_a_run_learns_the_same(adapter, config, model_dir, dataset, tokenizer, monkeypatch):
    def run(mode):
        args = config(
            fused_ops=mode, max_steps=3, logging_steps=1, gradient_checkpointing=True, beta=0.1, seed=7,
            output_dir=str(config().output_dir) + mode,
        )  # fmt: skip
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
        trainer = GRPOTrainer(
            model_dir, digit_share, args, dataset, processing_class=tokenizer, observer=Quiet(), peft_config=lora
        )
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        return [[row[key] for key in ("loss", "kl", "grad_norm", "reward")] for row in rows]

    taken = []
    monkeypatch.setattr(
        training_ops, "fuse_lora", lambda *a, real=training_ops.fuse_lora, **k: taken.append(real(*a, **k))
    )
    expected, found = run("off"), run("on")
    assert taken == [14 if adapter else 0]
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_an_activation_that_is_watched_is_called():
    model, seen = shaken(build("Llama")), []
    differentiable_modules(model, "on")
    expected = model(IDS).logits
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(IDS).logits, expected)
    assert seen
