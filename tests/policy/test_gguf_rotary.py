"""Longer contexts by slower rotation, as GGUF files say it: the model turns as the one that the file was made from."""

from __future__ import annotations

import pytest
import torch

from lowvram_grpo.policy.gguf import gguf_config
from lowvram_grpo.policy.load import load_causal_lm
from tests.families import gguf_file
from tests.families.zoo import NAMED, YARN, tiny

pytest.importorskip("gguf")
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
FILES = {
    "linear, of some layers": ("Gemma 3", {"full_attention": LINEAR, "sliding_attention": LOCAL}),
    "linear": ("Qwen2.5", LINEAR),
    "YaRN": ("Qwen3", {**YARN, "factor": 4.0, "original_max_position_embeddings": 32}),
    "none": ("Llama 3", {"rope_type": "default", "rope_theta": 5e4}),
}


@pytest.mark.parametrize("file", FILES)
def test_the_model_rotates_as_its_original(file, tmp_path):
    name, rotary = FILES[file]
    family, settings = NAMED[name], gguf_file.ARCHITECTURES[name][1]
    model = tiny(family, **{**settings, "rope_parameters": rotary})
    path, ids = str(tmp_path / "tiny.gguf"), torch.arange(5, 45)[None]
    gguf_file.write(path, family, model)
    loaded = load_causal_lm(path, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    if "rope_type" in rotary:
        assert gguf_config(str(tmp_path), "tiny.gguf")[0].rope_parameters["rope_type"] == rotary["rope_type"]
