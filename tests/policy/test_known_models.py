"""Well-known models without the hub."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lowvram_grpo.policy import known_models as architectures


def test_the_table_is_whole():
    assert len(architectures.names()) == 58
    known = {"Qwen2.5-7B": 7_615_616_512, "Qwen3-4B": 4_022_468_096, "Llama-3.1-8B": 8_030_261_248,
             "Phi-4-mini": 3_836_021_760, "Gemma-3-1B": 999_885_952}  # fmt: skip
    assert {name: architectures.parameters(name) for name in known} == known


@pytest.mark.parametrize(
    "spelling,name",
    [
        ("Qwen2.5-7B", "Qwen2.5-7B"),
        ("qwen2.5-7b-instruct", "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "Qwen2.5-7B"),
        ("qwen2.5:0.5b", "Qwen2.5-0.5B"),
        ("Qwen 2.5 3B", "Qwen2.5-3B"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B"),
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "Llama-3.2-1B"),
        ("unsloth/Qwen2.5-14B-Instruct-unsloth-bnb-4bit", "Qwen2.5-14B"),
        ("google/gemma-3-4b-it", "Gemma-3-4B"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M"),
        ("microsoft/Phi-4-mini-instruct", "Phi-4-mini"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("mistral-7b", "Mistral-7B-v0.3"),
        ("Qwen/Qwen3.5-4B-Base", "Qwen3.5-4B"),
        ("qwen3.5:4b", "Qwen3.5-4B"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "Qwen3-30B-A3B"),
        ("unsloth/gemma-4-E4B-it-unsloth-bnb-4bit", "Gemma-4-E4B"),
        ("LiquidAI/LFM2.5-1.2B-Thinking", "LFM2.5-1.2B"),
        ("allenai/Olmo-3-1025-7B", "Olmo-3-7B"),
        ("mistralai/Ministral-3-8B-Instruct-2512", "Ministral-3-8B"),
        ("granite4:tiny-h", "Granite-4.0-H-Tiny"),
        ("ibm-granite/granite-4.0-1b-base", "Granite-4.0-1B"),
        # Other shapes
        ("Qwen/Qwen3-30B", None),
        ("qwen2.5", None),
        ("gemma-4", None),
        ("mistralai/Mistral-7B-Instruct-v0.2", None),
        ("Qwen/Qwen2.5-72B", None),
        ("Qwen/Qwen2-7B", None),
        ("meta-llama/Llama-3-8B", None),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", None),
        ("microsoft/phi-4", None),
    ],
)
def test_spellings(spelling, name):
    assert architectures.lookup(spelling) == name


@pytest.mark.parametrize(
    "name,place",
    [
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Qwen2.5-Coder-0.5B", "Qwen/Qwen2.5-Coder-0.5B"),
        ("qwen2.5-math-7b-instruct", "Qwen/Qwen2.5-Math-7B-Instruct"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Qwen3-8B-Base", "Qwen/Qwen3-8B-Base"),
        ("Qwen3-4B", "Qwen/Qwen3-4B"),
        ("Qwen3-4B-Thinking-2507", "Qwen/Qwen3-4B-Thinking-2507"),
        ("Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"),
        ("gemma-3-1b-pt", "google/gemma-3-1b-pt"),
        ("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("Ministral-3-3B-Instruct", "mistralai/Ministral-3-3B-Instruct-2512-BF16"),
        ("Ministral-3-3B-Instruct-2512", "mistralai/Ministral-3-3B-Instruct-2512"),
        ("Olmo-3-7B", "allenai/Olmo-3-1025-7B"),
        # ollama's names mean the tuned model, which has this very name, or is the only tuned one.
        ("qwen3.5:4b", "Qwen/Qwen3.5-4B"),
        ("qwen3:8b", "Qwen/Qwen3-8B"),
        ("gemma3:4b", "google/gemma-3-4b-it"),
        ("gpt-oss:20b", "openai/gpt-oss-20b"),
        # Open, nobody's that is known, and names that need no help
        ("qwen2.5:0.5b", None),
        ("Gemma-3-4B", None),
        ("Phi-4-mini", None),
        ("Qwen2.5-Math-3B", None),
        ("Qwen3-4B-Instruct", None),
        ("Qwen2.5-0.5B-Instruct-bnb-4bit", None),
        ("Qwen/Qwen2.5-0.5B", None),
        ("unsloth/Qwen2.5-0.5B", None),
        ("./Qwen2.5-0.5B", None),
        ("models\\Qwen2.5-0.5B", None),
        ("Qwen2.5-0.5B.gguf", None),
        ("Qwen2.5-72B", None),
    ],
)
def test_a_name_without_an_owner_means_its_repository(name, place):
    assert architectures.repository(name) == place


@pytest.mark.parametrize(
    "place,tuned",
    [
        ("Qwen/Qwen2.5-0.5B", False),
        ("Qwen/Qwen2.5-0.5B-Instruct", True),
        ("Qwen/Qwen2.5-Math-7B", False),
        ("Qwen/Qwen3-8B", True),
        ("Qwen/Qwen3-8B-Base", False),
        ("google/gemma-4-E2B", False),
        ("google/gemma-4-E2B-it", True),
        ("google/gemma-3-1b-pt", False),
        ("allenai/Olmo-3-1025-7B", False),
        ("mistralai/Ministral-3-3B-Base-2512", False),
        ("ibm-granite/granite-4.0-h-tiny", True),
        ("openai/gpt-oss-20b", True),
    ],
)
def test_base_models_and_tuned_ones_are_told_apart(place, tuned):
    assert architectures.is_tuned(place) == tuned


@pytest.mark.parametrize(
    "name,kind",
    [
        ("unsloth/Qwen2.5-14B-Instruct-unsloth-bnb-4bit", "nf4"),
        ("somebody/x-bnb-8bit", "int8"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "awq"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "gptq"),
        ("Qwen/Qwen3-8B-FP8", "fp8"),
        ("unsloth/Qwen3-8B", None),
    ],
)
def test_a_name_says_how_weights_are_stored(name, kind):
    assert architectures.packaging(name) == kind


def test_every_repository_is_of_its_entry_and_is_found_by_its_own_name():
    for name in architectures.names():
        places = architectures.repositories(name)
        assert places and [architectures.lookup(place) for place in places] == [name] * len(places)
        assert [architectures.repository(place.split("/")[1]) for place in places] == places


def test_no_two_models_share_a_spelling():
    assert [architectures.lookup(name) for name in architectures.names()] == architectures.names()


def test_a_family_comes_by_size():
    assert architectures.family("Qwen/Qwen2.5-7B-Instruct") == [
        "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-14B",
    ]  # fmt: skip
    assert architectures.family("llama-3.1-8b")[0] == "Llama-3.2-1B"
    assert architectures.family("somebody/elses") == []


def test_planning_modules_load_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from lowvram_grpo.recipe import preset\n"
        "from lowvram_grpo.policy import known_models as architectures\n"
        "from lowvram_grpo.memory import budget, devices\n"
        "assert architectures.family('qwen3-4b') and preset.pick_for_gib(8) == '8gb'\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
