"""A CPU without 16-bit products: `auto` stays away from them, and who asks for them is told."""

from __future__ import annotations

import platform
import re

import pytest
import torch
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.policy.load import compute_dtype, load_causal_lm
from lowvram_grpo.policy.precision import auto_dtype, cpu_multiplies, slow_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def cpu(monkeypatch):
    """An x86 CPU that has what is named, whatever this one is."""

    def of(*, bf16: bool = False, amx: bool = False, fp16: bool = False):
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fp16, raising=False)

    return of


def test_what_a_cpu_multiplies(cpu, monkeypatch):
    for given, expected in [({}, False), ({"bf16": True}, True), ({"amx": True}, True), ({"fp16": True}, False)]:
        cpu(**given)
        assert cpu_multiplies(torch.bfloat16) is expected, given
        assert cpu_multiplies(torch.float16) is ("fp16" in given) and cpu_multiplies(torch.float32)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert not cpu_multiplies(torch.bfloat16)
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert cpu_multiplies(torch.bfloat16)  # another torch, which can't tell


def test_this_torch_can_tell():
    """Private names of torch: without them every CPU would pass for one that has the instructions."""
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
    assert isinstance(torch.ops.mkldnn._is_mkldnn_fp16_supported(), bool)


@pytest.mark.parametrize("name", HALF)
def test_auto_is_float32_where_the_stored_dtype_is_slow(cpu, name, tmp_path):
    make_model().to(HALF[name]).save_pretrained(tmp_path)
    loaded = lambda asked: load_causal_lm(str(tmp_path), device=CPU, dtype=torch.float32, init_kwargs={"dtype": asked})
    cpu()
    assert compute_dtype(CPU) == torch.float32  # `auto` of a recipe, on any CPU
    assert loaded("auto").dtype == torch.float32
    assert loaded(name).dtype == HALF[name]  # who insists gets it
    cpu(bf16=True, fp16=True)
    assert loaded("auto").dtype == HALF[name]


def test_auto_elsewhere_is_that_of_the_checkpoint(cpu):
    cpu()
    assert auto_dtype("auto", torch.bfloat16, CUDA) == "auto"
    assert auto_dtype("auto", torch.float32, CPU) == "auto"
    assert auto_dtype("auto", None, CPU) == torch.float32
    assert auto_dtype(torch.bfloat16, torch.bfloat16, CPU) == torch.bfloat16


@pytest.mark.parametrize("dtype, settings, words", [
    (torch.bfloat16, {}, "the model is in bfloat16, .* --dtype float32"),
    (torch.float16, {}, "the model is in float16, .* --dtype float32"),
    (torch.float32, {"bf16": True}, "bf16 is on, .* drop --bf16"),
    (torch.float32, {}, None),
])  # fmt: skip
def test_who_asks_is_told(cpu, config, tokenizer, dataset, dtype, settings, words):
    cpu()
    observer = Quiet()
    trainer = GRPOTrainer(make_model().to(dtype), digit_share, config(**settings), dataset, processing_class=tokenizer,
                          peft_config=LORA, observer=observer)  # fmt: skip
    said = [text for text in observer.said if "no instructions for" in text]
    if words is None:
        assert not said
    else:
        assert len(said) == 1 and re.search(words, said[0]), said
    cpu(bf16=True, fp16=True)
    assert slow_dtype(trainer.model, trainer.grpo_args) is None


def test_chat_and_evaluation_are_told_too(cpu, model_dir):
    from lowvram_grpo.jobs.inference import load_policy, recipe_to_sample
    from lowvram_grpo.jobs.loading import load_tokenizer_of, training_config

    said = []
    for dtype in ("auto", "bfloat16"):
        cpu()
        recipe = recipe_to_sample({"model": model_dir, "dtype": dtype, "use_cpu": True}, said.append)
        load_policy(recipe, training_config(recipe, weights=[]), load_tokenizer_of(recipe), said.append)
        assert sum("no instructions for" in text for text in said) == (dtype == "bfloat16"), said
