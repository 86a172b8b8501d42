"""Frozen weights that are streamed layer by layer from host memory: the bits of a model that has all of them, in every
pass, whatever they are in."""

from __future__ import annotations

import pytest
import torch
from passes import adapted, micro_batch, tiny, training_pass
from peft import LoraConfig
from streamed_policies import CPU, SIZES, assert_same_bits, loaded, policy, saved_model
from torch import nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy import window
from lowvram_grpo.policy.adapter import restore_adapter
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.embeddings import QuantizedTable
from lowvram_grpo.policy.offload import offloaded_activations
from lowvram_grpo.policy.reference import Reference
from lowvram_grpo.policy.shared_prefix import why_not
from lowvram_grpo.policy.stream import materialize, meta_source, skeleton
from lowvram_grpo.policy.weight_stream import stream_of, stream_weights, streamed_indices
from lowvram_grpo.policy.wrapper import unwrap

KINDS = ("float32", "bfloat16", "nf4", "int8")
COUNTS = (1, 2, 3, 5)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """A slot that nobody is in holds nothing but NaNs (or codes without sense): what is used too late shows."""
    leave = window.Window.leave

    def left(self, i, **settings):
        was_in_use = self._using[i % 2] == i
        if was_in_use:
            self._using[i % 2] = None
            self.slots[i % 2].data.fill_(0xFF)
            self._held[i % 2] = None
            self._using[i % 2] = i
        leave(self, i, **settings)

    monkeypatch.setattr(window.Window, "leave", left)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_bit_for_bit_those_of_resident_weights(saved, kind, count):
    resident = policy(loaded(saved, kind))
    streamed = policy(loaded(saved, kind, weight_offload=count), count)
    assert stream_of(streamed).layers == streamed_indices(5, count) and stream_of(resident) is None
    for _ in range(2):
        assert_same_bits(training_pass(streamed), training_pass(resident))
    with torch.no_grad():
        assert torch.equal(streamed(input_ids=micro_batch()[0]).logits, resident(input_ids=micro_batch()[0]).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"fused": False}, {"tile": 8}, {"tile": 8, "fused": False}, {"reentrant": True}, {"offload": True},
        {"around": True}, {"around": True, "reentrant": True}, {"around": True, "fused": False},
        {"shared": True}, {"shared": True, "tile": 8, "offload": True},
    ],
    ids=lambda settings: "-".join(settings),
)  # fmt: skip
def test_whatever_else_saves_memory_goes_along(saved, settings):
    settings = dict(settings)
    offload, shared = settings.pop("offload", False), settings.pop("shared", False)
    keywords = {}
    if shared:
        keywords = {"prompt_lengths": [5, 5, 5, 3, 3], "completion_lengths": [4, 7, 1, 6, 2], "group_sizes": [3, 2]}
    passes = []
    for count in (0, 5):
        model = policy(loaded(saved, "nf4", weight_offload=count or "off"), count, **settings)
        assert not shared or why_not(model) is None
        with offloaded_activations(offload, [*model.parameters()], min_bytes=1):
            passes.append(training_pass(model, **keywords))
    assert_same_bits(passes[1], passes[0])


def test_without_checkpoints_a_layers_weights_are_there_again_for_its_backward_pass(saved):
    passes = []
    for count in (0, 3):
        torch.manual_seed(7)
        model = adapted(loaded(saved, "nf4", weight_offload=count or "off"))
        if count:
            stream_weights(model, count, CPU)
        model.enable_input_require_grads()
        passes.append(training_pass(model))
    assert_same_bits(passes[1], passes[0])


def test_two_forward_passes_before_their_backward_passes(saved):
    grads = []
    for count in (0, 5):
        model = policy(loaded(saved, "float32"), count)
        model.train()
        ids = micro_batch()[0]
        first, second = model(input_ids=ids).logits, model(input_ids=ids.flip(1)).logits
        with torch.no_grad():
            model(input_ids=ids)
        second.square().mean().backward()
        first.square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_the_reference_is_the_adapter_switched_off_or_a_second_one(saved):
    for follows in (False, True):
        found = []
        for count in (0, 5):
            model = policy(loaded(saved, "nf4", weight_offload=count or "off"), count)
            reference = Reference(model, follows=follows)
            assert {p.device.type for p in model.parameters()} == {"cpu"}
            with reference.active() as other, torch.no_grad():
                found.append(other(input_ids=micro_batch()[0]).logits)
        assert torch.equal(found[0], found[1])


def test_dora_and_pissa_read_the_base_as_well(saved, tmp_path):
    for more in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        passes = []
        for count in (0, 4):
            torch.manual_seed(0)
            base = loaded(saved, "float32", weight_offload=count or "off")
            model = attach_lora(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **more))
            if count:
                stream_weights(model, count, CPU)
            checkpoint_activations(model)
            if "init_lora_weights" in more:
                if not count:  # the start of another machine, in whose place the base gives up another part
                    for name, start in model.changed_base.initial.items():
                        start.mul_(-1 if "layers.2" in name else 1)
                    model.save_pretrained(tmp_path)
                restore_adapter(model, str(tmp_path), "default")
            passes.append(training_pass(model))
        assert torch.equal(passes[1][0].logps, passes[0][0].logps)
        assert all(torch.equal(passes[1][1][name], grad) for name, grad in passes[0][1].items())


def test_trained_copies_of_norms_stay_and_are_trained(saved):
    passes = []
    for count in (0, 4):
        torch.manual_seed(0)
        base = loaded(saved, "nf4", weight_offload=count or "off")
        model = attach_lora(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"]))
        if count:
            stream_weights(model, count, CPU)
        checkpoint_activations(model)
        passes.append(training_pass(model))
    assert any("modules_to_save" in name for name in passes[0][1])
    assert all(torch.equal(passes[1][1][name], grad) for name, grad in passes[0][1].items())
    assert torch.equal(passes[1][0].logps, passes[0][0].logps)


def test_tables_of_ours_inside_of_layers_are_streamed_too():
    from lowvram_grpo.kernels.quantized import NF4Weight

    found = []
    for count in (0, 4):
        model = tiny("Llama", **{**SIZES, "num_hidden_layers": 4}).requires_grad_(False)
        for i, layer in enumerate(model.model.layers):
            weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(i))
            layer.table = QuantizedTable(NF4Weight.quantize(weight))
            layer.register_forward_hook(
                lambda module, args, out: out + torch.nn.functional.linear(out, _dense(module.table.weight)) / 64
            )
        if count:
            assert stream_weights(model, count, CPU).bytes > 4 * 64 * 64 // 2
        with torch.no_grad():
            found.append(model(input_ids=micro_batch()[0]).logits)
    assert torch.equal(found[0], found[1])


def _dense(weight):
    out = torch.empty(weight.shape)
    return weight.rows(torch.arange(weight.shape[0]), out)


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_the_ledger_sees_the_rest_and_two_slots_and_the_host_apart(kind):
    """On meta, where memory is planned: loading too, of which no moment holds more than that and a linear layer."""
    config = tiny("Llama", **{**SIZES, "num_hidden_layers": 8, "tie_word_embeddings": True}).config
    held, most, host = {}, {}, {}
    for count in (0, 3, 8):
        empty = skeleton(config, torch.bfloat16)
        with Ledger() as ledger, ledger.making("base weights"):
            with ledger.phase("load"):
                model = materialize(
                    empty, meta_source(empty), device="meta", dtype=torch.bfloat16, quantization=kind,
                    host_layers=count,
                )  # fmt: skip
            most[count] = ledger.phases["load"].bytes
            stream = stream_weights(model.requires_grad_(False), count, "meta") if count else None
            held[count], host[count] = ledger.categories, dict(ledger.host)
            with torch.no_grad():
                model.model(torch.zeros(1, 3, dtype=torch.long, device="meta"))
        if count:
            assert len(stream.layers) == count and stream.locked and len(stream.parts) == len(stream.sizes) == count
            assert host[count] == {"weights": stream.bytes}
            assert held[count]["streamed weights"] == 2 * max(stream.sizes)
            slots = {slot.untyped_storage()._cdata for slot in stream._window.slots}
            for weight in (p for i in stream.layers for p in model.model.layers[i].parameters()):
                state = getattr(weight, "quant_state", None)
                for part in [weight] + ([state.absmax, state.offset, state.state2.absmax] if state else []):
                    assert part.untyped_storage()._cdata in slots
            gone = sum(map(sum, stream.parts))
            assert held[count]["base weights"] == held[0]["base weights"] - gone
            # One linear layer at a time is on the device in 16 bits, and packed.
            linear = 128 * 64 * 2
            assert most[count] <= held[count]["base weights"] + 2 * linear
            assert 0.95 * stream.bytes <= gone <= stream.bytes or kind == "nf4"
    assert host[0] == {} and most[8] < most[3] < most[0]


def test_layers_are_spread_evenly():
    assert streamed_indices(4, 2) == [1, 3]
    assert streamed_indices(6, 3) == [1, 3, 5]
    assert streamed_indices(5, 9) == [0, 1, 2, 3, 4]
    assert streamed_indices(40, 1) == [20] and streamed_indices(3, 0) == []
    for layers in range(1, 50):
        for n in range(1, layers + 1):
            found = streamed_indices(layers, n)
            assert len(set(found)) == n and set(found) <= set(range(layers))


def test_what_is_saved_is_what_lies_at_home(saved):
    model = policy(loaded(saved, "nf4"))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    streamed = policy(loaded(saved, "nf4", weight_offload="auto"), 5)
    training_pass(streamed)
    state = streamed.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert_same_bits(training_pass(streamed), training_pass(model))


def test_weights_that_change_at_home_change_the_next_pass(saved):
    models = policy(loaded(saved, "float32")), policy(loaded(saved, "float32"), 5)
    for model in models:
        stream = stream_of(model)
        with torch.no_grad():
            if stream is None:
                unwrap(model).model.layers[3].mlp.up_proj.base_layer.weight.mul_(0.5)
            else:
                with stream.at_home():
                    unwrap(model).model.layers[3].mlp.up_proj.base_layer.weight.mul_(0.5)
    assert_same_bits(training_pass(models[1]), training_pass(models[0]))


def test_an_adapter_is_not_merged_into_weights_that_come_and_go(saved):
    model = policy(loaded(saved, "float32"), 2)
    with pytest.raises(UserError, match="without weight_offload"):
        model.merge_and_unload()


def test_weights_shared_between_layers_stay(saved):
    base = loaded(saved, "float32")
    layers = base.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    expected = training_pass(policy(base))
    base = loaded(saved, "float32")
    base.model.layers[2].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    model = policy(base, 5)
    inner = unwrap(model).model.layers
    assert inner[2].mlp.up_proj.base_layer.weight is inner[0].mlp.up_proj.base_layer.weight
    assert_same_bits(training_pass(model), expected)


def test_what_cannot_be_streamed_is_refused_by_one_sentence(saved):
    with pytest.raises(UserError, match="pass a peft_config"):
        stream_weights(loaded(saved, "float32").requires_grad_(True), 2, CPU)
    model = policy(loaded(saved, "float32"), 2)
    with pytest.raises(UserError, match="already"):
        stream_weights(model, 3, CPU)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(UserError, match="Own has no decoder layers"):
        stream_weights(Own(), 1, CPU)
