"""LoRA layers that share an input: one product or launch for all of them, and nothing kept alive."""

from __future__ import annotations

import weakref

import pytest
import torch
from conftest import make_model
from lora_layers import Products, assert_close, forwards, inside, two_steps, with_lora
from lowvram_grpo.kernels.decode import small_product
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout.adapters import fast_adapters
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling


def test_siblings_share_one_product():
    model = with_lora()
    x = torch.randn(3, 1, 64)
    attention = unwrap(model).model.layers[0].self_attn
    with torch.no_grad(), fast_adapters(model, "fused"):
        with Products() as products:
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
                layer(x)
        assert products.shapes("mm").count(((3, 64), (64, 12))) == 1
        assert [a for a, _ in products.shapes("addmm_")] == [(3, 4)] * 3
        with Products() as products:
            two_steps(model)
    narrow = [b for _, b in products.shapes("mm") if b[1] in (4, 8, 12)]
    assert len(narrow) == 2 * 2 * 4  # passes, layers, and q/k/v, o, gate/up, down
    assert len(products.shapes("addmm_")) == 2 * 14


def test_an_input_of_its_own_gets_a_product_of_its_own():
    model = with_lora()
    attention = unwrap(model).model.layers[0].self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    x, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    calls = [(q, x), (k, other), (v, x), (v, other), (k, x), (q, other), (q, x), (q, x), (k, x.clone()), (v, x)]
    with torch.no_grad():
        expected = [layer(value) for layer, value in calls]
        with fast_adapters(model, "fused"):
            assert_close([layer(value) for layer, value in calls], expected)
            assert_close([q(x[:, 0]), k(x[0, 0]), v(x.transpose(0, 1))], [expected[0][:, 0],
                         k.base_layer(x[0, 0]) + (expected[4] - k.base_layer(x))[0, 0],
                         expected[2].transpose(0, 1)])  # fmt: skip


def test_an_input_changed_in_place_between_two_steps_is_seen():
    model = with_lora()
    attention = unwrap(model).model.layers[0].self_attn
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    static = torch.randn(2, 1, 64)
    with torch.no_grad(), fast_adapters(model, "fused"):
        for _ in range(2):
            static.copy_(torch.randn(2, 1, 64))
            assert_close([f(static) for f in layers], [type(f).forward(f, static) for f in layers])


def test_neither_an_input_nor_a_product_is_kept_alive():
    model = with_lora()
    attention = unwrap(model).model.layers[0].self_attn
    x = torch.randn(2, 3, 64)
    alive = weakref.ref(x)
    with torch.no_grad(), Ledger() as ledger:
        with fast_adapters(model, "fused"):
            held = ledger.live
            attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
            assert ledger.live == held
            attention.q_proj(x)  # k and v never come
            assert ledger.live > held
            del x
            assert alive() is None and ledger.live == held
        assert ledger.live == 0


class Launches:
    """Counts launches of the kernel for sibling layers, which runs in Triton's interpreter."""

    def __init__(self, monkeypatch):
        self.sizes = []
        monkeypatch.setattr(small_product, "DEVICES", ("cpu", "cuda", "meta"))
        launch = small_product._launch
        monkeypatch.setattr(
            small_product,
            "_launch",
            lambda x, siblings, *rest: self.sizes.append(len(siblings)) or launch(x, siblings, *rest),
        )


@pytest.fixture
def launches(monkeypatch):
    if not (HAS_TRITON and interpreted()):
        pytest.skip("needs Triton's interpreter")
    return Launches(monkeypatch)


def half_with_lora(tmp_path, quantization=None, **settings):
    make_model(hidden_size=64, intermediate_size=128, attention_bias=True).save_pretrained(tmp_path)
    config = bitsandbytes_config(quantization, torch.float16) if quantization else None
    where = {"device": torch.device("cpu"), "dtype": torch.float16, "quantization_config": config}
    model = with_lora(load_causal_lm(str(tmp_path), **where), **settings)
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.half()
    return model


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_siblings_share_one_launch_with_bias_and_adapter(tmp_path, launches, quantization):
    model = half_with_lora(tmp_path, quantization, rank_pattern={"k_proj": 2, "up_proj": 3})
    expected = inside(model, "fused")
    with torch.no_grad(), fast_adapters(model, "fused", "on"), Products() as products:
        found = two_steps(model)
    assert launches.sizes == [3, 1, 2, 1] * 2 * 2  # layers, passes
    assert_close(found, expected, 0.01)
    narrow = [shape for shape in products.shapes("mm") if shape[1][1] in (2, 3, 4, 7, 10)]
    assert len(narrow) == 2 * 2 * 4 and not products.shapes("addmm_") and forwards(model) == []
    launches.sizes.clear()
    for mode in ("auto", "off"):  # auto waits for a card's word
        with torch.no_grad(), fast_adapters(model, "fused", mode):
            two_steps(model)
    assert not launches.sizes


def test_long_passes_and_other_dtypes_go_the_layers_own_way(tmp_path, launches):
    model = half_with_lora(tmp_path, "nf4")
    layer = unwrap(model).model.layers[0].self_attn.q_proj
    with torch.no_grad(), fast_adapters(model, "fused", "on"):
        for x in (torch.randn(1, 65, 64).half(), torch.randn(2, 64)):
            assert_close([layer(x)], [type(layer).forward(layer, x)], 0.01)
        assert not launches.sizes
        assert_close([layer(x.half())], [type(layer).forward(layer, x.half())], 0.01)
        assert launches.sizes == [3]
    for p in model.parameters():  # an adapter in float32, as training without autocast has it
        p.data = p.data.float() if p.requires_grad else p.data
    launches.sizes.clear()
    with torch.no_grad(), fast_adapters(model, "fused", "on"):
        layer(x.half())
    assert not launches.sizes


def test_an_input_of_its_own_gets_a_launch_of_its_own(tmp_path, launches):
    model = half_with_lora(tmp_path, "nf4")
    attention = unwrap(model).model.layers[0].self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    x, other = torch.randn(2, 3, 64).half(), torch.randn(2, 3, 64).half()
    calls = [(q, x), (k, other), (v, x), (v, other), (k, x), (q, other), (q, x), (q, x), (k, x.clone()), (v, x)]
    with torch.no_grad():
        expected = [layer(value) for layer, value in calls]
        with fast_adapters(model, "fused", "on"):
            assert_close([layer(value) for layer, value in calls], expected, 0.01)


def test_an_engine_samples_the_same_with_sibling_launches(tmp_path, launches):
    model = half_with_lora(tmp_path, "nf4")
    sample = lambda mode: RolloutEngine(model, Sampling(4, (1,), 0), fused_ops=mode).generate(
        [[5, 6, 7], [9, 10]], 2, seed=3
    )
    expected, found = sample("off"), sample("on")
    assert found.completion_ids == expected.completion_ids and launches.sizes
    for a, b in zip(found.sampling_per_token_logps, expected.sampling_per_token_logps):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)
