"""Every parameter comes from the checkpoint, whichever way it is loaded; what does not is named."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm

CPU = torch.device("cpu")
# Arguments that leave a model to from_pretrained, beside none that stream it where that can be.
WHOLE = {"use_safetensors": True}


@pytest.fixture
def folder(tmp_path):
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def rewritten(folder, change):
    """The folder with its weights as `change` makes them of the old ones."""
    path = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})
    return str(folder)


def loaded(folder, quantization="none", init=None):
    said = []
    config = bitsandbytes_config(quantization, torch.float32)
    model = load_causal_lm(
        str(folder), device=CPU, dtype=torch.float32, quantization_config=config, init_kwargs=init, tell=said.append
    )
    return model, said


def refusal(folder, *settings):
    with pytest.raises(UserError) as caught:
        loaded(folder, *settings)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_prefix_on_all_names(folder, prefix, quantization):
    rewritten(folder, lambda weights: {prefix + name: value for name, value in weights.items()})
    text = refusal(folder, quantization)
    assert "lacks 'lm_head.weight', 'model.embed_tokens.weight'" in text
    assert "merge_and_unload" in text if prefix.startswith("base") else f"begin with {prefix!r}" in text


@pytest.mark.parametrize("init", [None, WHOLE], ids=["streamed", "whole"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "change,words",
    [
        (
            lambda w: {n: v for n, v in w.items() if "layers.1" not in n},
            ["layers.1", "and 6 more", "download it again"],
        ),
        (lambda w: {n: v for n, v in w.items() if n != "model.norm.weight"}, ["lacks 'model.norm.weight';"]),
        (
            lambda w: {n.replace("q_proj", "query"): v for n, v in w.items()},
            ["lacks 'model.layers.0.self_attn.q_proj", "holds 'model.layers.0.self_attn.query"],
        ),
        (
            lambda w: {**w, "model.layers.0.mlp.up_proj.weight": w["model.layers.0.mlp.up_proj.weight"][:5]},
            ["'model.layers.0.mlp.up_proj.weight' is (5, 32) and not (48, 32)"],
        ),
        (
            lambda w: {**w, "lm_head.weight": w["lm_head.weight"][:, :16], "model.norm.weight": torch.ones(3)},
            ["'lm_head.weight' is (41, 16) and not (41, 32)", "1 other so"],
        ),
    ],
    ids=["a layer short", "no norm", "renamed", "a short matrix", "two of another shape"],
)
def test_weights_that_are_missing_or_misshapen_end_every_way_of_loading(folder, quantization, init, change, words):
    rewritten(folder, change)
    text = refusal(folder, quantization, init)
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_a_checkpoint_that_is_quantized_already(folder, tmp_path, quantization, lost):
    original, _ = loaded(folder, quantization)
    stored = tmp_path / "stored"
    original.save_pretrained(stored)
    again, said = loaded(stored)
    ids = torch.arange(3, 11)[None]
    assert torch.equal(again(ids).logits, original(ids).logits) and not said
    rewritten(stored, lambda weights: {name: value for name, value in weights.items() if not name.startswith(lost)})
    assert lost in refusal(stored)


def test_a_shape_that_packing_would_hide(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}), encoding="utf-8")
    for settings in (("nf4",), ("int8",), ("nf4", WHOLE)):
        assert "(32, 48) and not (32, 64)" in refusal(folder, *settings)


def test_what_the_model_has_no_place_for_is_one_notice(folder):
    extra = {f"visual.blocks.{i}.weight": torch.ones(2) for i in range(5)}
    rewritten(folder, lambda weights: {**weights, **extra})
    _, said = loaded(folder)
    assert len(said) == 1 and "5 weights that the model has no place for: 'visual.blocks.0.weight'" in said[0]
    with pytest.warns(UserWarning, match="5 weights"):
        load_causal_lm(str(folder), device=CPU, dtype=torch.float32)


def test_tied_weights_and_computed_buffers_are_neither_missing_nor_left_over(tmp_path):
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    make_model().save_pretrained(tmp_path / "tied")
    for change in (
        lambda w: w,
        lambda w: {**w, **computed},
        lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()},
    ):
        rewritten(tmp_path / "tied", change)
        for init in (None, WHOLE):
            model, said = loaded(tmp_path / "tied", "none", init)
            assert model.lm_head.weight is model.model.embed_tokens.weight and not said
    GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=32, n_layer=1, n_head=2, n_positions=32)).save_pretrained(
        tmp_path / "gpt2"
    )
    old = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    assert loaded(rewritten(tmp_path / "gpt2", lambda weights: {**weights, **old}))[1] == []


def test_a_base_model_without_its_head(tmp_path):
    model = make_model(tie_word_embeddings=False)
    model.model.save_pretrained(tmp_path)
    assert "lacks 'lm_head.weight': it was saved from LlamaModel, without the output head" in refusal(tmp_path)


def test_weights_with_an_adapter_around_them(folder):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(tie_word_embeddings=False), LoraConfig(r=2, target_modules=["q_proj"]))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "merge_and_unload" in refusal(folder)


def test_pickled_weights_are_accounted_for_too(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    model, said = loaded(folder)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"]) and not said
    del weights["model.norm.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    assert "lacks 'model.norm.weight'" in refusal(folder)


@pytest.mark.parametrize(
    "file,content",
    [
        ("model.safetensors", b"damaged!" * 20),
        ("model.safetensors", b""),
        ("pytorch_model.bin", b"damaged!" * 20),
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(99)),
        ("pytorch_model.bin", b""),
        ("pytorch_model.bin", pickle.dumps(print)),
    ],
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_files_that_hold_no_weights(folder, file, content, quantization):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    text = refusal(folder, quantization)
    assert "can't be read" in text and "download or save it again" in text


def test_a_shard_that_is_not_there(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert "model-00002" in refusal(tmp_path)


def test_an_index_beside_shards_of_another_save(tmp_path):
    """Its names are promised, and not in any file."""
    tiny_model("qwen2").save_pretrained(tmp_path, max_shard_size="100KB")
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    gone = sorted(load_file(first))[0]
    save_file({k: v for k, v in load_file(first).items() if k != gone}, first, metadata={"format": "pt"})
    assert gone in refusal(tmp_path)


def test_an_adapter_beside_a_model_is_refused(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = make_model(tie_word_embeddings=False)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    for path in (tmp_path / "a").glob("adapter_*"):
        shutil.copy(path, folder)
    for settings in (("none",), ("int8",), ("none", WHOLE)):
        assert "holds an adapter beside a model; keep the two in folders of their own" in refusal(folder, *settings)
