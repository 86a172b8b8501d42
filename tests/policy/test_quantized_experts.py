"""Experts in 4 bits compute what transformers' eager experts compute with the dequantized weights, and are made of what
checkpoints hold without a layer of them ever being dense."""

from __future__ import annotations

import pytest
import torch
from mixtures import CPU, MIXTURES, eager_twin, loaded, mixture
from peft import LoraConfig
from torch import nn

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy import quantized_experts as ours
from lowvram_grpo.policy.adapter import load_adapter
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.checkpoint import can_stream, checkpoint_source
from lowvram_grpo.policy.checkpointing import checkpoint_activations
from lowvram_grpo.policy.experts import router_loss_of
from lowvram_grpo.policy.merged_experts import merge
from lowvram_grpo.policy.quantized_experts import names, quantized_experts
from lowvram_grpo.policy.stream import materialize, skeleton

IDS = torch.arange(3, 30).view(3, 9)
ATTENTION = ["q_proj", "v_proj"]


def saved(tmp_path, family, **overrides):
    model = mixture(family, **overrides)
    model.save_pretrained(tmp_path / family)
    return tmp_path / family, model


def adapted(base, targets=ATTENTION, **given):
    model = attach_lora(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **given))
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)  # B of a new adapter is 0, and leaves A without a gradient
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_forward_and_gradients_are_those_of_the_eager_experts(tmp_path, family, monkeypatch):
    """Experts in tiles of three tokens, so that a tile ends in the middle of one's."""
    monkeypatch.setattr(ours, "TILE", 3)
    folder, _ = saved(tmp_path, family)
    base = loaded(folder)
    assert len(list(quantized_experts(base))) == (1 if family == "lfm2_moe" else 2)
    twin = adapted(eager_twin(folder, base))
    model = adapted(base)
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, atol=1e-5, rtol=1e-5)
    checkpoint_activations(model.train())
    gradients = []
    for each in (model, twin):
        each(IDS).logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(gradients[0][name], gradient, atol=2e-5 * max(1.0, largest), rtol=1e-4)
        assert largest > 1e-3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradients_of_routing_weights_reach_the_router(tmp_path, family):
    folder, _ = saved(tmp_path, family)
    base = loaded(folder)
    twin, found = eager_twin(folder, base), []
    for model in (base, twin):
        router = next(p for n, p in model.named_parameters() if n.endswith(("gate.weight", "router.weight")))
        found.append(torch.autograd.grad(model(IDS).logits.square().mean(), router.requires_grad_())[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)
    assert found[1].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_experts_bits_are_those_of_a_linear_layer_in_4_bits(tmp_path, family):
    from bitsandbytes.nn import Params4bit

    folder, dense = saved(tmp_path, family)
    for name, module in quantized_experts(loaded(folder)):
        for product, leaf in enumerate(names(module)):
            for expert, weight in enumerate(getattr(dense.get_submodule(name), leaf).detach()):
                matrices = module.expert_layout.matrices[product]
                assert len(matrices) == (2 if (family, leaf) == ("qwen3_moe", "gate_up_proj") else 1)
                for matrix, part in zip(matrices, weight.chunk(len(matrices))):
                    theirs = Params4bit(part.contiguous(), requires_grad=False, quant_type="nf4", blocksize=64).to(
                        "cpu"
                    )
                    state = theirs.quant_state
                    wanted = (theirs.data, state.absmax, state.state2.absmax, state.offset)
                    for a, b in zip(matrix.parts(module.home.record(expert)), wanted, strict=True):
                        assert torch.equal(a.flatten(), b.flatten())


@pytest.mark.parametrize("family", MIXTURES)
def test_what_from_pretrained_merges_is_streamed_to_the_same(tmp_path, family, monkeypatch):
    """Stored one by one (qwen3_moe, and mixtral under other names), or in one tensor of another name (granitemoe)."""
    folder, dense = saved(tmp_path, family)
    with monkeypatch.context() as patched:
        patched.setattr("lowvram_grpo.policy.load.load_whole", None)
        again, quantized = loaded(folder, "none"), loaded(folder)
    assert dense.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in dense.state_dict().items())
    # What only from_pretrained can load is brought to 4 bits afterwards.
    whole = loaded(folder, init_kwargs={"use_safetensors": True})
    for (_, a), (_, b) in zip(quantized_experts(quantized), quantized_experts(whole), strict=True):
        assert torch.equal(a.home.records, b.home.records)


def test_however_many_experts_one_matrix_is_dense_while_they_are_quantized(tmp_path):
    beside = []
    for count in (4, 64):
        dense = mixture("qwen3_moe", num_experts=count, hidden_size=128, moe_intermediate_size=64)
        dense.save_pretrained(tmp_path / str(count))
        empty, stored = skeleton(dense.config, torch.float32), checkpoint_source(str(tmp_path / str(count)))
        source = merge(empty, stored)
        source = source.renamed(can_stream(empty, source, "nf4"))
        with Ledger(device="cpu") as ledger:
            materialize(empty, source, device=CPU, dtype=torch.float32, quantization="nf4")
        beside.append(ledger.peak - ledger.live)
    # A layer has 180 more dense matrices of 32 KiB then.
    assert abs(beside[1] - beside[0]) < 64 * 2**10


def test_an_incomplete_checkpoint_is_no_model(tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = saved(tmp_path, "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError):
        loaded(folder)


def test_int8_and_dense_experts_in_host_memory_are_refused(tmp_path):
    folder, _ = saved(tmp_path, "qwen3_moe")
    with pytest.raises(UserError, match=r"6 experts a layer .* take nf4"):
        loaded(folder, "int8")
    with pytest.raises(UserError, match=r"expert_offload is auto.*quantization is none; set it to nf4"):
        loaded(folder, "none", expert_offload="auto")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_all_linear_is_attention_and_shared_experts(tmp_path, quantization):
    for family, shared in (("qwen3_moe", 0), ("qwen2_moe", 3)):
        folder, _ = saved(tmp_path, family)
        model = adapted(loaded(folder, quantization), "all-linear")
        trained = {n.partition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * (4 + shared)
        assert not any(".experts" in name or "gate." in name for name in trained)
        # peft changes a configuration whose names were experts' once, when it is put on a model again too.
        model.save_pretrained(tmp_path / "adapter")
        again = load_adapter(loaded(folder, quantization), str(tmp_path / "adapter"))
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_named_experts_are_no_targets_in_4_bits(tmp_path):
    folder, _ = saved(tmp_path, "qwen3_moe")
    with pytest.warns(UserWarning, match=r"'down_proj', 'gate_proj'.*are in 4 bits and get no adapter"):
        model = adapted(loaded(folder), ["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert {n.partition(".lora_")[0][-6:] for n, p in model.named_parameters() if p.requires_grad} == {"q_proj"}
    with pytest.raises(UserError, match=r"target_parameters names .*; load the model with quantization none"):
        adapted(loaded(folder), target_parameters=["mlp.experts.down_proj"])


def test_a_trained_adapter_merges_into_the_dense_model(tmp_path):
    folder, _ = saved(tmp_path, "qwen3_moe")
    base = loaded(folder)
    twin = eager_twin(folder, base)
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    merged = load_adapter(twin, str(tmp_path / "adapter")).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_16_bit_weights_compute_in_their_dtype(tmp_path):
    """As a 4-bit linear layer does: in its own dtype, back into that of what it was given."""
    model = mixture("qwen3_moe")
    module = model.model.layers[0].mlp.experts
    ours.quantize_experts(model, CPU, torch.bfloat16)
    hidden, index = torch.randn(7, 64), torch.arange(14).view(7, 2) % 6
    out = module(hidden, index, torch.full((7, 2), 0.5))
    assert out.dtype == torch.float32
    assert torch.equal(out, out.bfloat16().float()) is False  # sums are float32's
    half = module(hidden.bfloat16(), index, torch.full((7, 2), 0.5, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), out, atol=0.05, rtol=0.05)


def test_named_shared_experts_are_meant_by_their_names(tmp_path):
    """peft would take gate_proj of Qwen3-Next for the experts', which are no parameters here."""
    folder, _ = saved(tmp_path, "qwen3_next")
    model = adapted(loaded(folder), ["q_proj", "gate_proj", "up_proj", "down_proj"])
    trained = {n.partition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert sum("shared_expert." in name for name in trained) == 6
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(loaded(folder), str(tmp_path / "adapter"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_routers_loss_and_its_gradient_with_experts_in_4_bits(tmp_path):
    folder, _ = saved(tmp_path, "qwen3_moe")
    base, found = loaded(folder), []
    for causal_lm in (eager_twin(folder, base), base):
        model = adapted(causal_lm)
        router = router_loss_of(causal_lm, 0.1)
        with router.watched() as passes:
            causal_lm.model(input_ids=IDS, use_cache=False)
        loss = router.loss(passes[-1], torch.ones_like(IDS))
        found.append((loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in found[1][1:]) > 1e-4
