"""LoRA layers while sampling: the same numbers by less work, and the model afterwards as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from conftest import make_model, make_tokenizer
from lowvram_grpo.kernels.decode import small_product
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Gemma2Config, LlamaConfig, Phi3Config, Qwen2Config

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory import host
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm
from lowvram_grpo.policy.reference import REFERENCE, Reference
from lowvram_grpo.policy.wrapper import unwrap
from lowvram_grpo.rollout import adapters
from lowvram_grpo.rollout.adapters import fast_adapters
from lowvram_grpo.rollout.engine import RolloutEngine
from lowvram_grpo.rollout.sampler import Sampling

LORA = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
SIZES = {
    "vocab_size": 41, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "phi3": Phi3Config, "gemma2": Gemma2Config}
IDS = torch.randint(3, 41, (2, 7), generator=torch.Generator().manual_seed(5))


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def with_lora(base=None, **settings):
    base = make_model(hidden_size=64, intermediate_size=128) if base is None else base
    return randomize(get_peft_model(base, LoraConfig(**{**LORA, **settings}))).eval()


def of(architecture):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return with_lora(AutoModelForCausalLM.from_config(CONFIGS[architecture](**SIZES)))


def two_steps(model, autocast=nullcontext):
    """Hidden states of a prefill and of a decode step of one token."""
    with torch.no_grad(), autocast():
        decoder = unwrap(model).model
        cache = DynamicCache(config=decoder.config)
        first = decoder(IDS, past_key_values=cache).last_hidden_state
        return first, decoder(IDS[:, :1], past_key_values=cache).last_hidden_state


def inside(model, mode, autocast=nullcontext):
    with torch.no_grad(), autocast(), fast_adapters(model, mode):
        return two_steps(model)


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


class Products(TorchDispatchMode):
    """Shapes of all products of two matrices, by operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.seen.append((name, tuple(a.shape), tuple(b.shape)))
        return func(*args, **(kwargs or {}))

    def shapes(self, name):
        return [(a, b) for found, a, b in self.seen if found == name]


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("mode", ["auto", "fused", "merged"])
def test_the_numbers_are_those_of_peft(architecture, mode):
    model = of(architecture)
    expected = two_steps(model)
    with torch.no_grad(), model.disable_adapter():
        assert (two_steps(model)[1] - expected[1]).abs().max() > 0.01
    assert_close(inside(model, mode), expected)
    assert all(torch.equal(a, b) for a, b in zip(two_steps(model), expected))


def test_every_layer_is_taken_and_given_back():
    model = with_lora()
    with torch.no_grad(), fast_adapters(model, "fused"):
        assert len(forwards(model)) == 14
    assert forwards(model) == []
    with torch.no_grad(), fast_adapters(model, "off"):
        assert forwards(model) == []


@pytest.mark.parametrize("mode", ["fused", "merged"])
def test_the_active_adapter_counts_where_there_are_two(mode):
    model = with_lora()
    reference = Reference(model)
    assert reference.kind == "frozen adapter" and REFERENCE in model.peft_config
    frozen = two_steps(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".default." in name:
                p.mul_(1.5)
    moved = two_steps(model)
    assert_close(inside(model, mode), moved)
    with reference.active() as other:
        assert_close(inside(other, mode), frozen)
    assert not torch.allclose(moved[0], frozen[0], atol=1e-3)
    assert_close(inside(model, mode), moved)


def test_weights_are_read_anew_on_each_entry():
    model = with_lora()
    inside(model, "fused")
    randomize(model, seed=2)
    assert_close(inside(model, "fused"), two_steps(model))


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"rank_pattern": {"k_proj": 2, "up_proj": 3}}])
def test_other_scalings_and_unequal_ranks(settings):
    model = with_lora(**settings)
    assert_close(inside(model, "fused"), two_steps(model))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_bases(tmp_path, quantization):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = bitsandbytes_config(quantization, torch.float32)
    base = load_causal_lm(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32, quantization_config=config)
    model = with_lora(base)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    for mode in ("fused", "merged"):
        with torch.no_grad(), fast_adapters(model, mode):
            assert len(forwards(model)) == 14
        assert_close(inside(model, mode), two_steps(model))
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    model = with_lora()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype) if not parameter.requires_grad else parameter.data
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    with Products() as products:
        assert_close(inside(model, "fused", autocast), two_steps(model, autocast), 0.03)
    assert len(products.shapes("addmm_")) == 2 * 14
    with torch.no_grad(), fast_adapters(model, "fused"):  # entered outside of it: slower, and right
        found = two_steps(model, autocast)
    assert_close(found, two_steps(model, autocast), 0.03)


def test_a_16_bit_base_without_autocast_has_its_adapter_in_float32_as_in_training():
    model = with_lora(make_model(hidden_size=64, intermediate_size=128).bfloat16())
    assert unwrap(model).dtype == torch.bfloat16
    with torch.no_grad(), fast_adapters(model, "fused"):
        found = two_steps(model)
    assert_close(found, two_steps(model), 0.005)


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


@pytest.mark.parametrize("mode", ["fused", "merged"])
def test_the_model_can_be_freed_afterwards(mode):
    model = with_lora()
    inside(model, mode)
    layer = weakref.ref(unwrap(model).model.layers[0].mlp.up_proj.lora_A["default"].weight)
    del model
    gc.collect()
    assert layer() is None


def test_a_prefill_holds_no_more_than_by_peft():
    model = with_lora()
    x = torch.randn(4, 64, 64)
    mlp = unwrap(model).model.layers[0].mlp
    peaks = {}
    for mode in ("off", "fused"):
        with torch.no_grad(), fast_adapters(model, mode), Ledger() as ledger:
            mlp(x)
        peaks[mode] = ledger.peak
    assert peaks["fused"] < peaks["off"]


@pytest.mark.parametrize("mode", ["fused", "merged"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_model_as_it_was(mode, error):
    model = with_lora()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error), torch.no_grad(), fast_adapters(model, mode):
        assert forwards(model)
        raise error
    assert forwards(model) == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values()))


def test_an_interrupt_between_two_merges_leaves_the_model_as_it_was(monkeypatch):
    model = with_lora()
    before = copy.deepcopy(model.state_dict())
    merge, calls = adapters._merge, []

    def interrupted(weight, *rest):
        merge(weight, *rest)
        calls.append(weight)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "_merge", interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), fast_adapters(model, "merged"):
        pass
    assert len(calls) == 3 and forwards(model) == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_come_back_bit_for_bit(dtype, monkeypatch):
    monkeypatch.setattr(host, "_CHUNK", 5000)  # weights that span chunks, chunks that span weights
    monkeypatch.setattr(adapters, "_TILE", 500)
    model = with_lora(make_model(hidden_size=64, intermediate_size=128).to(dtype))
    odd = unwrap(model).model.layers[0].mlp.up_proj.base_layer.weight
    with torch.no_grad():
        odd[0, :4] = torch.tensor([float("inf"), -0.0, 1e-7, float("nan")])
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    merged, bits = 0, {2: torch.int16, 4: torch.int32}
    with torch.no_grad(), fast_adapters(model, "merged"):
        for name, p in model.named_parameters():
            merged += not torch.equal(p.nan_to_num(), before[name][1].nan_to_num())
    assert merged == 14
    for name, p in model.named_parameters():
        pointer, old = before[name]
        kind = bits[p.element_size()]
        assert p.data_ptr() == pointer and torch.equal(p.detach().view(kind), old.view(kind))


def test_a_merged_weight_is_the_sum_rounded_once():
    model = with_lora(make_model(hidden_size=64, intermediate_size=128).bfloat16())
    layer = unwrap(model).model.layers[1].self_attn.q_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + 1.5 * b @ a
    with torch.no_grad(), fast_adapters(model, "merged"):
        equal = layer.base_layer.weight == exact.bfloat16()
    assert equal.float().mean() > 0.999  # float32 is on the other side of a tie now and then


def test_a_weight_that_something_else_reads_is_fused_instead():
    base = make_model(hidden_size=64, intermediate_size=128)
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    model = with_lora(base)
    expected = two_steps(model)
    weight = unwrap(model).model.layers[0].mlp.up_proj.base_layer.weight
    with torch.no_grad(), fast_adapters(model, "merged"), Products() as products:
        before = weight.clone()
        assert_close(two_steps(model), expected)
        assert torch.equal(weight, before)
    assert len(products.shapes("addmm_")) == 2 * 2


def test_what_is_not_plain_is_left_alone():
    for settings in ({"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}):
        base = of("qwen2").unload()
        model = with_lora(base, **settings)
        with torch.no_grad(), fast_adapters(model, "merged"):
            assert forwards(model) == []
    model = with_lora()
    layers = unwrap(model).model.layers
    layers[1].mlp = layers[0].mlp  # the parent is shared, its layers are in one place
    layers[1].self_attn.v_proj = layers[0].self_attn.v_proj
    with torch.no_grad(), fast_adapters(model, "merged"):
        assert len(forwards(model)) == 3 + 7 - 1 and "forward" not in vars(layers[0].self_attn.v_proj)
    model = with_lora()
    with torch.no_grad():
        with model.disable_adapter(), fast_adapters(model, "merged"):
            assert forwards(model) == []
        model.merge_adapter()
        with fast_adapters(model, "fused"):
            assert forwards(model) == []
        model.unmerge_adapter()
        model = with_lora(lora_dropout=0.1).train()
        with fast_adapters(model, "fused"):
            assert forwards(model) == []
        with fast_adapters(model.eval(), "fused"):
            assert len(forwards(model)) == 14


def test_lm_head_and_embeddings_are_left_alone():
    base = make_model(hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    model = with_lora(base, target_modules=["lm_head", "embed_tokens", "o_proj"])
    with torch.no_grad(), fast_adapters(model, "merged"):
        assert all(name.endswith("o_proj") for name in forwards(model)) and len(forwards(model)) == 2


def test_two_active_adapters_are_left_to_peft():
    model = with_lora()
    model.add_adapter("more", LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "more"])
    with torch.no_grad(), fast_adapters(model, "fused"):
        assert forwards(model) == []


def test_gradients_take_the_slow_way():
    model = with_lora()
    with torch.no_grad(), fast_adapters(model, "fused"), torch.enable_grad():
        unwrap(model)(IDS).logits.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    unwrap(model)(IDS).logits.sum().backward()
    assert len(found) == 28 and all(torch.equal(found[n], p.grad) for n, p in model.named_parameters() if n in found)


@pytest.mark.parametrize("mode", ["fused", "merged"])
def test_a_memory_plan_can_run_through_it(mode):
    model = with_lora(make_model(hidden_size=64, intermediate_size=128).bfloat16()).to("meta")
    decoder = unwrap(model).model
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    with torch.no_grad(), Ledger() as ledger, fast_adapters(model, mode):
        assert (ledger.categories.get("adapter", 0) > 0) == (mode == "fused")
        assert decoder(ids).last_hidden_state.shape == (2, 7, 64)


def test_a_model_without_an_adapter_is_no_matter():
    model = make_model()
    assert isinstance(model, nn.Module)
    expected = two_steps(model)
    assert all(torch.equal(a, b) for a, b in zip(inside(model, "auto"), expected))


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match="'fast'"), fast_adapters(make_model(), "fast"):
        pass


def test_the_benchmark_runs(model_dir, capsys):
    from time_adapters import main

    main([model_dir, "--device", "cpu", "--rounds", "1", "--steps", "1", "--context", "9"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["off", "fused", "merged"]


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
