"""Of a multimodal checkpoint the language model alone, and an adapter that the published model takes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.policy import load
from lowvram_grpo.policy.adapter import load_adapter, restore_adapter
from lowvram_grpo.policy.build import attach_lora
from lowvram_grpo.policy.load import bitsandbytes_config, keep_differentiable, load_causal_lm, model_config
from lowvram_grpo.policy.text_model import rename_saved, text_name
from tests.families.zoo import FAMILIES, NAMED, tiny_whole

CPU = torch.device("cpu")
IDS = torch.arange(5, 25).view(2, 10)
LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
WHOLE = [
    family if family.name in ("Gemma 3", "Ministral 3", "Qwen3.5") else pytest.param(family, marks=pytest.mark.full)
    for family in FAMILIES
    if family.whole
]
of_every_family = pytest.mark.parametrize("family", WHOLE, ids=lambda family: family.slug)


def saved(family, folder) -> tuple[nn.Module, str]:
    model = tiny_whole(family)
    model.save_pretrained(folder)
    return model, str(folder)


def loaded(folder, quantization="none", tell=lambda sentence: None):
    config = bitsandbytes_config(quantization, torch.float32)
    return load_causal_lm(folder, device=CPU, dtype=torch.float32, quantization_config=config, tell=tell)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def speaking(model):
    torch.manual_seed(3)
    model = attach_lora(model, LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@of_every_family
def test_it_says_what_the_whole_one_says_of_text(family, tmp_path):
    whole, folder = saved(family, tmp_path)
    said = []
    model = loaded(folder, tell=said.append)
    assert torch.equal(logits(model), logits(whole))
    assert not any("vision" in name or "visual" in name for name, _ in model.named_modules())
    assert model.config._name_or_path == folder and "the language model alone is loaded" in said[-1]
    for config in (model_config(folder), resolve_config(folder)[0]):
        assert type(config) is type(model.config)


@pytest.mark.parametrize("family", ["Gemma 3", "Ministral 3", "Qwen3.5", "Gemma 4 E"])
def test_it_is_streamed_in_4_bits_too(family, tmp_path, monkeypatch):
    _, folder = saved(NAMED[family], tmp_path)
    plain = loaded(folder)
    monkeypatch.setattr(load, "load_whole", None)
    assert loaded(folder, "nf4").is_loaded_in_4bit
    assert torch.equal(logits(loaded(folder)), logits(plain))


@pytest.mark.parametrize("family", ["Gemma 3", "Ministral 3", "Qwen3.5"])
def test_the_whole_way_loads_the_same(family, tmp_path):
    """As int8, and checkpoints that are stored in 4 bits, go."""
    _, folder = saved(NAMED[family], tmp_path / "dense")
    kwargs = {"dtype": torch.float32}
    config, said = model_config(folder), []
    model = load.load_whole(folder, config, CPU, kwargs, lambda model: (), said.append, inside=True)
    assert torch.equal(logits(model), logits(loaded(folder))) and not said
    assert loaded(folder, "int8").is_loaded_in_8bit


def test_a_checkpoint_in_4_bits_keeps_the_layers_that_it_skipped(tmp_path):
    folder = saved(NAMED["Gemma 3"], tmp_path / "dense")[1]
    skipped = ["lm_head", "vision_tower", "multi_modal_projector", "model.language_model.layers.1.mlp"]
    config = bitsandbytes_config("nf4", torch.float32)
    config.llm_int8_skip_modules = skipped
    kind = transformers.Gemma3ForConditionalGeneration
    packed = kind.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "packed")
    keep_differentiable(packed)
    model = loaded(str(tmp_path / "packed"))
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is not nn.Linear
    torch.testing.assert_close(logits(model), logits(packed))


@of_every_family
def test_the_published_model_takes_its_adapter(family, tmp_path):
    whole, folder = saved(family, tmp_path / "base")
    model = speaking(loaded(folder))
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    mapping = transformers.AutoModelForCausalLM._model_mapping
    kind = mapping.get(type(whole.config), type(whole))
    found = PeftModel.from_pretrained(kind.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(model))
    # And here, from the beginning and in the middle.
    again = load_adapter(loaded(folder), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(model))
    other = attach_lora(loaded(folder), LoraConfig(**LORA))
    restore_adapter(other, str(tmp_path / "adapter"), "default")
    torch.testing.assert_close(logits(other), logits(model))


@pytest.mark.parametrize("family", ["Qwen3.5", "Gemma 4 dense"])
def test_the_whole_class_takes_what_is_sent_to_vllm(family, tmp_path):
    whole, folder = saved(NAMED[family], tmp_path / "base")
    model = speaking(loaded(folder))
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    rename_saved(tmp_path / "adapter", model)
    rename_saved(tmp_path / "adapter", model)  # once is as good as twice
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names and all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(whole, tmp_path / "adapter")), logits(model))
    torch.testing.assert_close(logits(load_adapter(loaded(folder), str(tmp_path / "adapter"))), logits(model))


def test_exclusions_of_an_adapter_are_kept(tmp_path):
    _, folder = saved(NAMED["Gemma 3"], tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], exclude_modules=["0.self_attn.k_proj"])
    model = attach_lora(loaded(folder), config)
    model.save_pretrained(tmp_path / "adapter")
    text = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(text["target_modules"]) == ["k_proj", "q_proj"]
    again = load_adapter(loaded(folder), str(tmp_path / "adapter"))
    layers = again.get_base_model().model.layers
    assert not hasattr(layers[0].self_attn.k_proj, "lora_A") and hasattr(layers[1].self_attn.k_proj, "lora_A")


@pytest.mark.parametrize(
    "name,alone",
    [
        ("language_model.model.layers.0.x.weight", "model.layers.0.x.weight"),
        ("model.language_model.layers.0.x.weight", "model.layers.0.x.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.text_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("vision_tower.vision_model.x", None),
    ],
)
def test_names_of_its_weights(name, alone):
    assert text_name(name) == alone


def test_what_the_class_has_no_use_for_is_left_in_the_file(tmp_path, monkeypatch):
    """Qwen3.5's checkpoints hold layers that predict several tokens, which transformers does not run."""
    _, folder = saved(NAMED["Qwen3.5"], tmp_path)
    plain = logits(loaded(folder))
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}, path, metadata={"format": "pt"})
    monkeypatch.setattr(load, "load_whole", None)
    assert torch.equal(logits(loaded(folder)), plain)
