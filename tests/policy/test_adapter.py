"""An adapter that does not fit, or is none, is explained in one whole sentence."""

from __future__ import annotations

import pytest
from conftest import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy.adapter import adapter_config, load_adapter, restore_adapter


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter of rank 4."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(make_model(), lora).save_pretrained(tmp_path / "run" / "adapter")
    return tmp_path / "run" / "adapter"


def explained(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_good_one_loads(adapter):
    assert adapter_config(str(adapter)).r == 4
    assert load_adapter(make_model(), str(adapter)).active_adapters == ["default"]


def test_shapes_of_another_model(adapter):
    text = explained(load_adapter, make_model(hidden_size=16), str(adapter))
    assert str(adapter) in text and "[4, 32]" in text and "[4, 16]" in text and "--model" in text


def rewritten(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change,words",
    [
        (
            lambda w: {k: v for k, v in w.items() if "layers.1" not in k},
            ["lacks 'base_model.model.model.layers.1", "11 more"],
        ),
        (lambda w: {k.replace("q_proj", "query"): v for k, v in w.items()}, ["lacks", "q_proj", "holds", "query"]),
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, ["lacks", "holds '_orig_mod.base_model."]),
        (
            lambda w: w | {k.replace("layers.1", "layers.2"): v.clone() for k, v in w.items() if "layers.1" in k},
            ["holds 'base_model.model.model.layers.2", "no place"],
        ),
    ],
    ids=["a layer short", "renamed", "prefixed", "a layer more"],
)
def test_a_part_that_is_not_there_or_left_over(adapter, change, words):
    """peft leaves what it does not find at zero, and warns."""
    rewritten(adapter, change)
    for text in (
        explained(load_adapter, make_model(), str(adapter)),
        explained(restore_adapter, get_peft_model(make_model(), adapter_config(str(adapter))), str(adapter), "default"),
    ):
        assert str(adapter) in text and "--model" in text
        for word in words:
            assert word in text, text


def test_a_saved_head_that_is_not_there(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(make_model(tie_word_embeddings=False), lora).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda w: {k: v for k, v in w.items() if "lm_head" not in k})
    assert "lacks 'base_model.model.lm_head.weight'" in explained(
        load_adapter, make_model(tie_word_embeddings=False), str(tmp_path)
    )


def test_layers_of_another_model(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(make_model(), lora).save_pretrained(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text(config.replace("q_proj", "c_attn"), encoding="utf-8")
    text = explained(load_adapter, make_model(), str(tmp_path))
    assert str(tmp_path) in text and "c_attn" in text


def test_a_run_directory_instead_of_its_adapter(adapter):
    text = explained(adapter_config, str(adapter.parent))
    assert "adapter_config.json" in text and f"did you mean {adapter}?" in text


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("adapter_config.json", None, "no adapter_config.json"),
        ("adapter_config.json", "{", "can't be read"),
        ("adapter_config.json", "{}", "only LoRA"),
        ("adapter_config.json", '{"peft_type": "PREFIX_TUNING"}', "PREFIX_TUNING"),
        ("adapter_model.safetensors", None, "no weights"),
    ],
)
def test_damaged_folders(adapter, name, content, words):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_text(content, encoding="utf-8")
    assert words in explained(adapter_config, str(adapter))


def test_weights_that_are_no_weights(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    assert str(adapter) in explained(load_adapter, make_model(), str(adapter))


def test_no_such_adapter():
    assert "'/no/such/adapter'" in explained(adapter_config, "/no/such/adapter")
