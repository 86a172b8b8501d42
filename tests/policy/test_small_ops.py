"""Norms, MLPs and rotary positions while sampling: the same numbers, and the model afterwards as it was."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
from conftest import make_model
from lowvram_grpo.kernels.decode import int8_logits, small_product, small_product_kernel
from lowvram_grpo.kernels.layer import ops as layer_ops
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from models import LISTED, build, with_lora
from torch import nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy import small_ops, trials
from lowvram_grpo.policy.checkpointing import tile_mlps
from lowvram_grpo.policy.small_ops import fast_modules
from lowvram_grpo.rollout.adapters import fast_adapters
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling

IDS = torch.randint(3, 41, (2, 11), generator=torch.Generator().manual_seed(5))
# rms_norm, swiglu, rope of two layers.
COUNTS = {
    "Llama": (5, 2, 1), "Qwen2": (5, 2, 1), "Qwen3": (9, 2, 1), "Mistral": (5, 2, 1), "Gemma2": (9, 2, 1),
    "Gemma3": (13, 2, 1), "Phi": (0, 0, 1), "Phi3": (5, 2, 1), "SmolLM3": (5, 2, 1), "Granite": (5, 2, 1),
    "GPT2": (0, 0, 0),
}  # fmt: skip
in_triton = pytest.mark.skipif(not (HAS_TRITON and interpreted()), reason="needs Triton's interpreter")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def shaken(model):
    """Norm weights as training leaves them: ones and zeros would hide a wrong formula."""
    for i, p in enumerate(model.parameters()):
        if p.ndim == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
    return model


def traces(model):
    """What `fast_modules` could leave behind."""
    own = [name for name, m in model.named_modules() if {"forward", "_untiled_forward"} & set(vars(m))]
    return own, [hasattr(place, "original") for place in functions(model)]


def functions(model):
    files = {type(m).__module__ for m in model.modules() if type(m).__name__.endswith("Attention")}
    return [f for file in sorted(files) if (f := getattr(sys.modules[file], "apply_rotary_pos_emb", None))]


@pytest.fixture(autouse=True)
def _nothing_left_of_other_tests():
    """A model that has been trained keeps its architecture's rotary function replaced as long as it lives."""
    gc.collect()


@pytest.fixture
def kernels(monkeypatch):
    """Triton kernels, by the interpreter; counts their launches."""
    monkeypatch.setattr(layer_ops, "uses_triton", lambda *tensors: True)
    calls = dict.fromkeys(small_ops.KINDS, 0)
    for kind in calls:
        launch = getattr(layer_ops, f"{kind}_triton")

        def counted(*args, kind=kind, launch=launch, **kwargs):
            calls[kind] += 1
            return launch(*args, **kwargs)

        monkeypatch.setattr(layer_ops, f"{kind}_triton", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind,extra", LISTED)
def test_without_a_gpu_the_bits_are_the_same(kind, extra, dtype):
    model = shaken(build(kind, **extra)).to(dtype)
    expected, before = logits(model), functions(model)
    with fast_modules(model, "on") as counts:
        assert tuple(counts.values()) == COUNTS[kind]
        assert torch.equal(logits(model), expected)
        assert functions(model) != before or not COUNTS[kind][2]
    assert traces(model) == ([], [False] * len(before)) and functions(model) == before
    assert torch.equal(logits(model), expected)


@in_triton
@pytest.mark.parametrize("kind,extra", LISTED)
def test_kernels_give_the_same_hidden_states(kind, extra, kernels):
    model = shaken(build(kind, **extra))
    expected = logits(model)
    with fast_modules(model, "on"):
        assert not any(kernels.values())
        found = logits(model)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert tuple(kernels.values()) == (COUNTS[kind][0], COUNTS[kind][1], 2 * COUNTS[kind][2])


@in_triton
def test_an_engine_samples_the_same_with_adapters_and_kernels(kernels):
    model = with_lora(shaken(build("Qwen3")))
    engine = RolloutEngine(model, Sampling(5, (1,), 0))
    sample = lambda: engine.generate([[5, 6, 7, 8], [9, 10]], 2, seed=3)
    expected = sample()
    with fast_modules(model, "on"):
        found = sample()
    assert found.completion_ids == expected.completion_ids and all(kernels.values())
    for a, b in zip(found.sampling_per_token_logps, expected.sampling_per_token_logps):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_adapters_stay_in_force():
    model = with_lora(shaken(build("Llama")))
    expected = logits(model)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(IDS).logits, expected, atol=0.01)
    for order in ((fast_modules, fast_adapters), (fast_adapters, fast_modules)):
        modes = {fast_modules: "on", fast_adapters: "fused"}
        with torch.no_grad(), order[0](model, modes[order[0]]), order[1](model, modes[order[1]]):
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), expected)


def test_tiled_mlps_stay_tiled():
    model = build("Llama")
    expected = logits(model)
    tile_mlps(model, 4)
    before = [(m.forward, m._untiled_forward) for m in model.modules() if hasattr(m, "_tile_tokens")]
    sizes = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[-2]))
    with fast_modules(model, "on") as counts:
        assert counts["swiglu"] == 2
        torch.testing.assert_close(logits(model), expected)
    assert max(sizes) == 4
    assert before == [(m.forward, m._untiled_forward) for m in model.modules() if hasattr(m, "_tile_tokens")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_model_as_it_was(error):
    model = build("Qwen2")
    before, weights = functions(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error), fast_modules(model, "on"):
        assert len(traces(model)[0]) == 7 and traces(model)[1] == [True]
        raise error
    assert traces(model) == ([], [False]) and functions(model) == before
    assert all(map(torch.equal, model.state_dict().values(), weights.values()))


def test_an_interrupt_on_entry_leaves_the_model_as_it_was(monkeypatch):
    model = build("Qwen2")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(small_ops._REPLACE, "rope", interrupted)
    with pytest.raises(KeyboardInterrupt), fast_modules(model, "on"):
        pass
    assert traces(model) == ([], [False])


def test_two_blocks_may_end_in_any_order():
    first, second = build("Qwen2"), build("Qwen2")
    before = functions(first)
    one, other = fast_modules(first, "on"), fast_modules(second, "on")
    one.__enter__(), other.__enter__()
    one.__exit__(None, None, None)
    assert traces(second)[1] == [True]
    other.__exit__(None, None, None)
    assert functions(first) == before and traces(first) == traces(second) == ([], [False])
    with fast_modules(first, "on"), fast_modules(second, "on"):
        pass
    assert functions(first) == before


def test_gradients_go_the_models_own_way(monkeypatch):
    model = build("Qwen3")
    expected = torch.autograd.grad(model(IDS).logits.sum(), list(model.parameters()))
    with fast_modules(model, "on"):
        monkeypatch.setattr(layer_ops, "uses_triton", None)  # all three ask it first
        found = torch.autograd.grad(model(IDS).logits.sum(), list(model.parameters()))
    assert all(map(torch.equal, found, expected))


def test_auto_takes_what_counts_say_where_a_trial_is_passed_and_on_a_cpu_nothing(monkeypatch):
    model = build("Llama")
    assert set(small_ops.KINDS) < set(trials.EXPECTED_FASTER) < set(trials.TRIALS)
    # Whether a product of ours beats a library's own is for a card to say.
    assert not {"nf4_product", "dense_product"} & set(trials.EXPECTED_FASTER)
    for mode in ("auto", "off"):
        with fast_modules(model, mode) as counts:
            assert not any(counts.values()) and traces(model) == ([], [False])
    card, passed = torch.device("cuda", 0), []
    monkeypatch.setattr(trials, "passes_trial", lambda kind, device, dtype: passed.append((kind, device.type)) or True)
    assert trials.usable("int8_head", card, "auto") and passed == [("int8_head", "cuda")]
    assert not trials.usable("nf4_product", card, "auto") and trials.usable("nf4_product", card, "on")
    # A plan counts what `auto` may fall back to.
    meta = torch.device("meta")
    assert not trials.usable("int8_head", meta, "auto") and trials.usable("int8_head", meta, "on")
    monkeypatch.setattr(trials, "passes_trial", lambda *_: False)
    assert not trials.usable("int8_head", card, "auto") and not trials.usable("int8_head", card, "on")
    with pytest.raises(UserError, match="fused_ops"), fast_modules(model, "yes"):
        pass


@pytest.mark.parametrize("cc,half", [(75, torch.float16), (86, torch.bfloat16)])
def test_a_trial_is_in_the_dtype_that_this_card_computes_in(cc, half, monkeypatch):
    asked = []
    monkeypatch.setattr(trials, "card", lambda device: (cc, 46))
    monkeypatch.setattr(trials, "passes_trial", lambda *question: asked.append(question[2]) or True)
    assert all(trials.usable(kind, torch.device("cuda", 0), "auto") for kind in ("int8_head", "nf4_dense", "sample"))
    assert asked == [half, half, torch.float32]


def test_a_kernel_that_does_not_run_on_the_card_is_not_used(monkeypatch):
    asked = []

    def passes_trial(kind, device, dtype):
        asked.append(dtype)
        return kind != "rms_norm" or dtype != torch.bfloat16

    monkeypatch.setattr(small_ops, "passes_trial", passes_trial)
    model = build("Llama").bfloat16()
    with fast_modules(model, "on") as counts:
        assert counts == {"rms_norm": 0, "swiglu": 2, "rope": 1}
    assert set(asked) == {torch.bfloat16}


@in_triton
def test_the_question_whether_a_kernel_runs_has_right_and_wrong_answers(monkeypatch, kernels):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(trials, "random_numbers", lambda *shape: _OnCard(torch.randn(shape)))
    trials.passes_trial.cache_clear()
    assert all(trials.passes_trial(kind, card, torch.float32) for kind in small_ops.KINDS) and all(kernels.values())
    products = ("nf4_product", "dense_product")
    assert all(trials.passes_trial(kind, card, torch.float16) for kind in products)
    trials.passes_trial.cache_clear()
    launch = small_product._launch
    wrong = lambda x, siblings, z, *rest: launch(x, siblings, 2 * z, *rest)  # twice the adapter
    monkeypatch.setattr(small_product, "_launch", wrong)
    assert not any(trials.passes_trial(kind, card, torch.float16) for kind in products)
    monkeypatch.setattr(layer_ops, "rms_norm_triton", lambda x, *args, **kwargs: x)
    monkeypatch.setattr(layer_ops, "swiglu_triton", None)
    monkeypatch.setattr(layer_ops, "rope_triton", lambda q, k, *args: (q, k))
    assert not any(trials.passes_trial(kind, card, torch.float32) for kind in small_ops.KINDS)
    trials.passes_trial.cache_clear()


def test_a_trial_launches_what_a_run_launches(monkeypatch):
    """All tiles, and more than one step and warp: a loop that ends at once is compiled as if there were none."""
    x, heads, products, draws = torch.randn(3, 4, 5, 64), [], [], []
    monkeypatch.setattr(trials, "linear_logits", lambda h, head, **_: heads.append(h.shape) or h)
    trials.TRIALS["int8_head"](x.half())
    for cc in (75, 86):
        tiles = {int8_logits.tiles_of(cc, n) for n in range(1, int8_logits.MOST_ROWS + 1)}
        assert {int8_logits.tiles_of(cc, n) for n, _ in heads} == tiles
    assert all(width > 2 * int8_logits.BLOCK for _, width in heads)

    def product(rows, layer, z, tiles):
        products.append((rows.shape[1], tiles))
        return trials.small_product_ref(rows, layer, z)

    monkeypatch.setattr(trials, "small_product", product)
    trials.TRIALS["dense_product"](x.half())
    assert all(width > 64 * tiles.blocks for width, tiles in products)
    assert [tiles for _, tiles in products] == small_product_kernel.all_tiles(86)
    draw = trials.draw_by_masses_ref
    monkeypatch.setattr(
        trials, "draw_by_masses", lambda logits, *rest: draws.append(logits.shape[1]) or draw(logits, *rest)
    )
    found, expected = trials.TRIALS["sample"](x)
    assert torch.equal(found, expected) and draws[0] > 256 * 128  # two warps draw a block


@in_triton
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no room"), RuntimeError("Triton Error [CUDA]: out of memory"),
     RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")],
)  # fmt: skip
def test_memory_that_runs_out_is_no_answer(monkeypatch, kernels, error):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(trials, "random_numbers", lambda *shape: _OnCard(torch.randn(shape)))
    trials.passes_trial.cache_clear()
    swiglu_triton = layer_ops.swiglu_triton

    def full(*_):
        raise error

    monkeypatch.setattr(layer_ops, "swiglu_triton", full)
    with pytest.raises(type(error)):
        trials.passes_trial("swiglu", card, torch.float32)
    monkeypatch.setattr(layer_ops, "swiglu_triton", swiglu_triton)
    assert trials.passes_trial("swiglu", card, torch.float32)
    trials.passes_trial.cache_clear()


class _OnCard:
    """Random numbers that stay on the CPU wherever they are sent."""

    def __init__(self, x):
        self.x = x

    def to(self, device, dtype):
        return self.x.to(dtype)


class _Odd:
    """Forwards that look like what they are not."""

    @staticmethod
    def norm(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 2 * self.variance_epsilon)
        return self.weight * x32.to(x.dtype)

    @staticmethod
    def mlp(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def test_what_computes_something_else_is_left_alone(monkeypatch):
    model = make_model()
    norm, mlp = type(model.model.norm), type(model.model.layers[0].mlp)
    monkeypatch.setattr(norm, "forward", _Odd.norm)
    monkeypatch.setattr(mlp, "forward", _Odd.mlp)
    with fast_modules(model, "on") as counts:
        assert counts == {"rms_norm": 0, "swiglu": 0, "rope": 1}
    monkeypatch.undo()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()  # the exact one
    model.model.norm.forward = model.model.norm.forward  # a hook's place
    with fast_modules(model, "on") as counts:
        assert counts == {"rms_norm": 4, "swiglu": 0, "rope": 1}
    assert "forward" in vars(model.model.norm)


def test_other_layouts_of_rotary_positions_are_left_alone():
    cohere = build("Cohere", logit_scale=0.3)
    expected = logits(cohere)
    with fast_modules(cohere, "on") as counts:
        assert counts["rope"] == 0 and counts["swiglu"] == 2
        assert torch.equal(logits(cohere), expected)


def test_a_model_on_meta_has_its_modules_replaced_too():
    with torch.device("meta"):
        model = build("Gemma2")
    with torch.no_grad(), fast_modules(model, "on") as counts:
        assert tuple(counts.values()) == COUNTS["Gemma2"]
        assert model(IDS.to("meta")).logits.shape == (2, 11, 97)


def test_the_global_generator_and_the_model_are_not_held():
    model = build("Llama")
    state = torch.get_rng_state()
    with fast_modules(model, "on"):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
