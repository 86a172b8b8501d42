"""What load_causal_lm streams, what it leaves to from_pretrained, and checkpoints that are quantized already."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer
from tiny import tiny_model

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy import pretrained
from lowvram_grpo.policy.load import bitsandbytes_config, load_causal_lm

CPU = torch.device("cpu")
IDS = torch.arange(5, 29).view(2, 12)


@pytest.fixture
def folder(tmp_path):
    model = tiny_model("qwen2")
    model.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(tmp_path / "m")
    return str(tmp_path / "m")


@pytest.fixture
def ways(monkeypatch):
    """Which way each load went."""
    went = []

    def spy(owner, name, word):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (went.append(word), real(*a, **k))[1])

    spy(pretrained, "materialize", "streamed")
    spy(pretrained.AutoModelForCausalLM, "from_pretrained", "whole")
    return went


def loaded(folder, quantization="none", **kwargs):
    config = bitsandbytes_config(quantization, torch.float32)
    return load_causal_lm(folder, device=CPU, dtype=torch.float32, quantization_config=config, **kwargs)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "quantization,init,way",
    [
        ("none", {}, "streamed"),
        ("nf4", {"device_map": {"": "cpu"}}, "streamed"),
        ("nf4", {"device_map": "cpu", "revision": "main", "trust_remote_code": True}, "streamed"),
        ("none", {"attn_implementation": "eager"}, "streamed"),
        ("none", {"dtype": "bfloat16"}, "streamed"),
        ("none", {"dtype": "auto"}, "streamed"),
        ("int8", {}, "whole"),
        ("none", {"device_map": "auto"}, "whole"),
        ("none", {"use_safetensors": True}, "whole"),
        ("nf4", {"quantization_config": bitsandbytes_config("nf4", torch.bfloat16)}, "whole"),
    ],
)
def test_arguments_of_from_pretrained_keep_working(folder, ways, quantization, init, way):
    model = loaded(folder, quantization, init_kwargs=init)
    assert ways == [way]
    half = init.get("dtype") == "bfloat16"
    assert model.model.norm.weight.dtype == (torch.bfloat16 if half else torch.float32)
    assert model.config._attn_implementation == init.get("attn_implementation", "sdpa")
    assert getattr(model, "is_quantized", False) == (quantization != "none")
    assert model.generation_config.top_k == 7
    assert model.config._name_or_path == folder
    assert logits(model).isfinite().all()


def test_weights_of_other_formats_are_loaded_whole(tmp_path, ways):
    model = tiny_model("qwen2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(loaded(str(tmp_path))), logits(model))
    assert ways == ["whole"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_what_stays_on_the_host_does_so_either_way(folder, quantization):
    model = loaded(folder, quantization, keep_on_host=lambda model: ("model.embed_tokens", "lm_head"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.device == CPU
    assert torch.equal(logits(model), logits(loaded(folder, quantization)))


@pytest.mark.parametrize("asked", ["none", "nf4"])
def test_a_checkpoint_stored_in_4_bits_is_taken_as_it_is(folder, tmp_path, ways, asked):
    original = loaded(folder, "nf4")
    original.save_pretrained(tmp_path / "stored")
    ways.clear()
    again = loaded(str(tmp_path / "stored"), asked)
    assert ways == ["whole"]
    assert again.is_loaded_in_4bit
    assert torch.equal(logits(again), logits(original))


def test_a_stored_model_computes_in_the_dtype_that_is_asked_for(folder, tmp_path):
    loaded(folder, "nf4").save_pretrained(tmp_path / "stored")
    again = load_causal_lm(str(tmp_path / "stored"), device=CPU, dtype=torch.bfloat16)
    assert again.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert {p.dtype for p in again.parameters()} == {torch.uint8, torch.bfloat16}
    assert logits(again).dtype == torch.bfloat16


def test_asking_for_another_quantization_than_is_stored_is_refused(folder, tmp_path):
    loaded(folder, "nf4").save_pretrained(tmp_path / "stored")
    with pytest.raises(UserError, match="is stored in nf4 already and cannot be loaded in int8; set quantization to"):
        loaded(str(tmp_path / "stored"), "int8")


def test_a_damaged_download_is_one_sentence(folder):
    path = f"{folder}/model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(5000)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match="is cut off; download it again"):
        loaded(folder)
