"""GGUF files, written here with llama.cpp's own package, load as the models they were made from."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from conftest import WORDS
from tiny import LLAMA3_ROPE, tiny_model

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm, load_tokenizer

gguf = pytest.importorskip("gguf")

CPU = torch.device("cpu")
IDS = torch.arange(5, 29).view(2, 12)


def permuted(weight, heads):
    """llama.cpp rotates neighbouring elements, transformers the two halves of a head."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, architecture, kind="F32", divisors=None, more=None):
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(
        ["<|endoftext|>", *WORDS[1:], "Ġ", "Ġa", "Ġb", *(f"x{i}" for i in range(config.vocab_size - len(WORDS) - 3))]
    )
    writer.add_token_merges(["Ġ a", "Ġ b"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), config.num_hidden_layers
    )
    for name, value in model.state_dict().items():
        if name in getattr(model, "all_tied_weights_keys", {}):
            continue
        value = value.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = permuted(value, heads)
        form = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(value), form)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=form)
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def load(path, quantization="none", **kwargs):
    config = bitsandbytes_config(quantization, torch.float32)
    return load_causal_lm(path, device=CPU, dtype=torch.float32, quantization_config=config, **kwargs)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


ORIGINALS = {"qwen2": {}, "qwen3": {}, "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}}


@pytest.mark.parametrize("architecture", ORIGINALS)
@pytest.mark.parametrize("kind,tolerance", [("F32", 0), ("F16", 0), ("Q8_0", 0.05)])
def test_logits_are_those_of_the_original(tmp_path, architecture, kind, tolerance):
    original = tiny_model(architecture, **ORIGINALS[architecture])
    if kind == "F16":
        for parameter in original.parameters():
            parameter.data = parameter.data.half().float() if parameter.dim() == 2 else parameter.data
    loaded = load(write_gguf(tmp_path / "m.gguf", original, architecture, kind))
    expected = logits(original)
    assert (logits(loaded) - expected).abs().max() <= 1e-5 + tolerance * expected.abs().max()
    assert loaded.config.tie_word_embeddings == original.config.tie_word_embeddings
    if tolerance:
        assert not torch.equal(logits(loaded), expected)


def test_quantized_anew_it_is_the_original_quantized(tmp_path):
    original = tiny_model("qwen2")
    original.save_pretrained(tmp_path / "hf")
    loaded = load(write_gguf(tmp_path / "m.gguf", original, "qwen2"), "nf4")
    assert loaded.is_loaded_in_4bit
    assert torch.allclose(logits(loaded), logits(load(str(tmp_path / "hf"), "nf4")), atol=1e-5)


def test_scaled_rotary_frequencies_of_llama_3_are_kept(tmp_path):
    original = tiny_model("llama", rope_parameters=LLAMA3_ROPE)
    plain = 1 / LLAMA3_ROPE["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / original.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert divisors.max() > 2
    loaded = load(write_gguf(tmp_path / "m.gguf", original, "llama", divisors=divisors))
    assert torch.allclose(logits(loaded), logits(original), atol=1e-4)


def test_the_tokenizer_is_in_the_file_too(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), "qwen2")
    tokenizer = load_tokenizer(path)
    assert tokenizer.convert_tokens_to_ids(["a", "z", "<eos>"]) == [WORDS.index(w) for w in ("a", "z", "<eos>")]
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1
    assert load_tokenizer(str(tmp_path), gguf_file="m.gguf").get_vocab() == tokenizer.get_vocab()
    assert load(path).generation_config.eos_token_id == 1
    # The trainer finds the tokenizer by the model's name.
    assert load_tokenizer(load(path).config._name_or_path).get_vocab() == tokenizer.get_vocab()
    assert load(str(tmp_path), init_kwargs={"gguf_file": "m.gguf"}).config.vocab_size == 96


def test_without_the_package_its_install_line_is_named(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), "qwen2")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    for attempt in (load, load_tokenizer):
        with pytest.raises(UserError, match="`pip install gguf`"):
            attempt(path)


def test_architectures_without_tables_and_files_that_are_none_are_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "rwkv6")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"'odd.gguf' cannot be trained here .*rwkv6.*; take the model's safetensors"):
        load(str(tmp_path / "odd.gguf"))
    (tmp_path / "empty.gguf").write_bytes(b"no")
    with pytest.raises(UserError, match=r"empty\.gguf"):
        load(str(tmp_path / "empty.gguf"))
    with pytest.raises(UserError, match=r"absent\.gguf"):
        load(str(tmp_path / "absent.gguf"))


def test_int8_and_arguments_of_from_pretrained_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), "qwen2")
    with pytest.raises(UserError, match="quantization none or nf4"):
        load(path, "int8")
    with pytest.raises(UserError, match="model_init_kwargs has subfolder='x'"):
        load(path, init_kwargs={"subfolder": "x"})


def test_a_gguf_file_can_be_planned(tmp_path):
    """What `plan` and `bench` ask for a configuration knows the file too."""
    from lowvram_grpo.plan.architectures import resolve_config

    model = tiny_model("qwen2")
    write_gguf(tmp_path / "tiny.gguf", model, "qwen2")
    config, source = resolve_config(str(tmp_path / "tiny.gguf"))
    assert source.endswith("tiny.gguf")
    assert (config.hidden_size, config.num_hidden_layers) == (model.config.hidden_size, model.config.num_hidden_layers)


def test_tensors_without_a_place_are_one_notice(tmp_path):
    model, said = tiny_model("qwen2"), []
    path = write_gguf(tmp_path / "m.gguf", model, "qwen2", divisors=np.ones(8, dtype=np.float32))
    load(path, tell=said.append)
    assert not said
    path = write_gguf(tmp_path / "n.gguf", model, "qwen2", more={"v.patch.weight": np.ones(8, dtype=np.float32)})
    load(path, tell=said.append)
    assert len(said) == 1 and "1 weight that the model has no place for: 'v.patch.weight'" in said[0]
