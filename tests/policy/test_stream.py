"""A streamed model is the one that from_pretrained makes, and is never larger than it ends up."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CONFIGS, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lowvram_grpo.errors import UserError
from lowvram_grpo.memory.ledger import Ledger
from lowvram_grpo.policy.checkpoint import can_stream, checkpoint_source
from lowvram_grpo.policy.load import bitsandbytes_config, keep_differentiable
from lowvram_grpo.policy.stream import expected_names, materialize, meta_source, skeleton

CPU = torch.device("cpu")
IDS = torch.arange(5, 29).view(2, 12)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


def saved(tmp_path, architecture, **kwargs):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / architecture, **kwargs)
    return str(tmp_path / architecture)


def whole(folder, quantization, dtype=torch.float32):
    config = bitsandbytes_config(quantization, dtype)
    placed = {} if config is None else {"quantization_config": config, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **placed)
    keep_differentiable(model)
    return model


def streamed(folder, quantization, dtype=torch.float32, **kwargs):
    model, source = skeleton(AutoConfig.from_pretrained(folder), dtype), checkpoint_source(folder)
    names = can_stream(model, source, quantization)
    assert names is not None
    materialize(model, source.renamed(names), device=CPU, dtype=dtype, quantization=quantization, **kwargs)
    keep_differentiable(model)
    return model


def assert_same_state(ours, theirs):
    ours, theirs = ({**m.state_dict(), **dict(m.named_buffers())} for m in (ours, theirs))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_streamed_model_is_the_whole_one_bit_for_bit(tmp_path, architecture, quantization, dtype):
    folder = saved(tmp_path, architecture)
    ours, theirs = streamed(folder, quantization, dtype), whole(folder, quantization, dtype)
    assert_same_state(ours, theirs)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    tied = ours.config.tie_word_embeddings
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
    assert not ours.training


@pytest.mark.parametrize("architecture", CONFIGS)
def test_loss_and_adapter_gradients_are_those_of_the_whole_model(tmp_path, architecture):
    folder, results = saved(tmp_path, architecture), []
    for model in (streamed(folder, "nf4"), whole(folder, "nf4")):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(**LORA)).train()
        loss = wrapped(IDS, labels=IDS).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}))
    (ours, our_grads), (theirs, their_grads) = results
    assert torch.equal(ours, theirs)
    assert our_grads.keys() == their_grads.keys() and len(our_grads) >= 16
    for name, grad in their_grads.items():
        assert torch.equal(our_grads[name], grad), name
        assert grad.abs().max() > 0, name


def test_what_from_pretrained_leaves_on_a_quantized_model_is_there(tmp_path):
    folder = saved(tmp_path, "qwen2")
    ours, theirs = streamed(folder, "nf4"), whole(folder, "nf4")
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "training", "name_or_path"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._name_or_path == folder
    for (name, mine), (_, other) in zip(ours.named_modules(), theirs.named_modules()):
        assert type(mine) is type(other), name
        if hasattr(other, "quant_state"):
            assert mine.weight.module is mine and mine.weight.quant_state is mine.quant_state
            skipped = ("module", "quant_state")
            described = [{k: v for k, v in vars(m.weight).items() if k not in skipped} for m in (mine, other)]
            assert described[0] == described[1], name
            assert mine.compute_dtype == other.compute_dtype


def test_a_saved_streamed_model_loads_again(tmp_path):
    model = streamed(saved(tmp_path, "qwen2"), "nf4")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map={"": "cpu"})
    keep_differentiable(again)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_shards_are_found_by_their_index(tmp_path):
    folder = saved(tmp_path, "llama", max_shard_size="60KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    assert_same_state(streamed(folder, "nf4"), whole(folder, "nf4"))


def test_the_base_models_own_checkpoint_has_names_without_a_prefix(tmp_path):
    tiny_model("qwen2").model.save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in checkpoint_source(str(tmp_path / "base")).tensors
    assert_same_state(streamed(str(tmp_path / "base"), "none"), tiny_model("qwen2"))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loading_holds_the_final_model_and_one_tensor(tmp_path, architecture, quantization):
    folder = saved(tmp_path, architecture)
    config = AutoConfig.from_pretrained(folder)
    counts = {}
    for device in ("cpu", "meta"):
        model = skeleton(config, torch.bfloat16)
        source = checkpoint_source(folder).renamed(can_stream(model, checkpoint_source(folder), quantization))
        with Ledger() as ledger:
            materialize(
                model,
                source if device == "cpu" else meta_source(model),
                device=device,
                dtype=torch.bfloat16,
                quantization=quantization,
            )
        counts[device] = ledger.live, ledger.peak
    largest = max(t.size for t in source.tensors.values())
    footprint = sum(t.untyped_storage().nbytes() for t in _storages(streamed(folder, quantization, torch.bfloat16)))
    live, peak = counts["cpu"]
    assert footprint * 0.98 <= live <= footprint * 1.02
    assert peak <= live + 3 * largest
    assert counts["meta"] == pytest.approx(counts["cpu"], rel=0.02)


def _storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return {t.untyped_storage()._cdata: t for t in tensors}.values()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_of_any_size_loads_and_trains_on_meta(architecture):
    model = skeleton(tiny_model(architecture).config, torch.bfloat16)
    materialize(model, meta_source(model), device="meta", dtype=torch.bfloat16, quantization="nf4")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    wrapped = get_peft_model(model, LoraConfig(**LORA)).train()
    ids, mask = IDS.to("meta"), torch.ones(2, 1, 12, 12, dtype=torch.bool, device="meta")
    # A mask that is ready-made: transformers would look at the values of another.
    masks = {"full_attention": mask, "sliding_attention": mask} if architecture.startswith("gemma") else mask
    loss = wrapped(ids, attention_mask=masks, position_ids=ids).logits.float().sum()
    loss.backward()
    assert all(p.grad.shape == p.shape for n, p in wrapped.named_parameters() if "lora_" in n)


def test_loading_on_meta_leaves_nothing_behind_for_real_loads(tmp_path):
    """bitsandbytes keeps its table of statistics on the first device that it quantizes on."""
    import bitsandbytes.functional as F

    F.name2qmap.clear()
    model = skeleton(tiny_model("llama").config, torch.float32)
    materialize(model, meta_source(model), device="meta", dtype=torch.float32, quantization="nf4")
    folder = saved(tmp_path, "llama")
    assert_same_state(streamed(folder, "nf4"), whole(folder, "nf4"))


def test_buffers_on_meta_are_computed_anew(tmp_path):
    folder = saved(tmp_path, "gemma3")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    assert all(buffer.is_meta for buffer in model.buffers())
    materialize(model, checkpoint_source(folder), device=CPU, dtype=torch.bfloat16)
    assert_same_state(model, whole(folder, "none", torch.bfloat16))


def test_what_stays_on_the_host_is_a_view_of_the_file(tmp_path):
    folder = saved(tmp_path, "llama")
    kept = ("model.embed_tokens", "lm_head")
    with Ledger() as ledger:
        model = streamed(folder, "none", keep_on_host=kept)
    elsewhere = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith(kept))
    assert ledger.live < elsewhere + model.lm_head.weight.nbytes
    assert not model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad
    assert_same_state(model, whole(folder, "none"))
    half = streamed(folder, "none", torch.bfloat16, keep_on_host=kept)
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_a_weight_that_may_be_trained_is_no_view_of_the_file(tmp_path):
    folder = saved(tmp_path, "qwen2")
    model = streamed(folder, "none")
    path = tmp_path / "qwen2" / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_state(model, tiny_model("qwen2"))
    assert all(p.requires_grad for p in model.parameters())


def tensors_of(model):
    return {name: value for name, value in tiny_model("llama").state_dict().items() if name in expected_names(model)}


def test_missing_tensors_are_named_three_at_most():
    model = skeleton(tiny_model("llama").config, torch.float32)
    tensors = tensors_of(model)
    for name in [n for n in tensors if "layers.1.mlp" in n or "layers.1.self_attn.q" in n]:
        del tensors[name]
    with pytest.raises(UserError, match=r"lacks 'model.layers.1.mlp.down_proj.weight', .*'.*' and 1 more; download"):
        materialize(model, tensors.items(), device=CPU, dtype=torch.float32)


def test_unexpected_and_misshapen_tensors_are_named():
    model = skeleton(tiny_model("llama").config, torch.float32)
    with pytest.raises(UserError, match=r"holds 'visual.weight'"):
        materialize(model, [("visual.weight", torch.ones(1))], device=CPU, dtype=torch.float32)
    model = skeleton(tiny_model("llama").config, torch.float32)
    with pytest.raises(UserError, match=r"'lm_head.weight' is \(3, 64\) in the checkpoint and \(96, 64\)"):
        materialize(model, [("lm_head.weight", torch.ones(3, 64))], device=CPU, dtype=torch.float32)


def test_a_file_cut_off_is_named(tmp_path):
    path = tmp_path / "llama" / "model.safetensors"
    folder = saved(tmp_path, "llama")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors.*download it again"):
        checkpoint_source(folder)


def stored(tensors, tmp_path, like):
    from safetensors.torch import save_file

    like.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    return skeleton(like.config, torch.float32), checkpoint_source(str(tmp_path))


def test_checkpoints_that_transformers_would_change_are_not_streamed(tmp_path):
    like = tiny_model("qwen2")
    tensors = {n: t for n, t in like.state_dict().items() if n != "lm_head.weight"}
    model, source = stored(tensors, tmp_path, like)
    assert can_stream(model, source, "nf4") is not None
    assert can_stream(model, source, "int8") is None
    head = like.lm_head.weight.detach()
    assert can_stream(*stored({**tensors, "lm_head.weight": head.clone()}, tmp_path, like), "nf4") is not None
    assert can_stream(*stored({**tensors, "lm_head.weight": head + 1}, tmp_path, like), "nf4") is None
    assert can_stream(*stored({**tensors, "visual.weight": head.clone()}, tmp_path, like), "nf4") is None
    renamed = {n.replace("q_proj", "query"): t for n, t in tensors.items()}
    assert can_stream(*stored(renamed, tmp_path, like), "nf4") is None
    old = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert can_stream(*stored(old, tmp_path, like), "nf4") is not None


def test_experts_are_left_to_from_pretrained(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert can_stream(skeleton(config, torch.float32), checkpoint_source(str(tmp_path)), "nf4") is None
