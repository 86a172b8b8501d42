"""A model's configuration from a folder, a file or the table, without the hub."""

from __future__ import annotations

import json

import pytest
import torch

from lowvram_grpo.errors import UserError
from lowvram_grpo.plan.architectures import resolve_config
from lowvram_grpo.policy import known_models


@pytest.mark.parametrize("name", known_models.names())
def test_the_model_has_the_published_number_of_parameters(name):
    from transformers import AutoModelForCausalLM

    config, source = resolve_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == known_models.parameters(name)
    assert source == f"the table of architectures ({name})" and config.dtype == torch.bfloat16


def test_a_folder_and_its_file_come_before_the_table(tmp_path, monkeypatch, model_dir):
    config, source = resolve_config(model_dir)
    assert config.hidden_size == 32 and source == model_dir
    assert resolve_config(f"{model_dir}/config.json")[0].hidden_size == 32
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-model").rename(tmp_path / "Qwen2.5-7B")
    assert resolve_config("Qwen2.5-7B")[0].hidden_size == 32


def test_what_is_no_model_is_said_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not a model's configuration"):
        resolve_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody"}), encoding="utf-8")
    with pytest.raises(UserError, match="not a model's configuration"):
        resolve_config(str(tmp_path / "config.json"))


def test_a_near_spelling_is_named():
    with pytest.raises(UserError, match=r"did you mean 'qwen2\.5-7b'.*hub"):
        resolve_config("Qwen/Qwn2.5-7B")
