"""Well-known models without the hub."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lowvram_grpo.policy import known_models as architectures


def test_the_table_is_whole():
    assert len(architectures.names()) == 20
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
        # Other shapes
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
        ("qwen2.5:0.5b", "Qwen/Qwen2.5-0.5B"),
        ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Qwen2.5-Coder-0.5B", "Qwen/Qwen2.5-Coder-0.5B"),
        ("qwen2.5-math-7b-instruct", "Qwen/Qwen2.5-Math-7B-Instruct"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Qwen3-8B-Base", "Qwen/Qwen3-8B-Base"),
        ("Qwen3-4B-Thinking-2507", "Qwen/Qwen3-4B-Thinking-2507"),
        ("Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"),
        ("gemma-3-1b-pt", "google/gemma-3-1b-pt"),
        ("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3"),
        # None of these has a repository of the bare name: the instruct model is meant.
        ("Gemma-3-4B", "google/gemma-3-4b-it"),
        ("Phi-4-mini", "microsoft/Phi-4-mini-instruct"),
        # Nobody's that is known, and names that need no help
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
    said = []
    assert architectures.named(name, said.append) == (place or name)
    assert said == ([f"model: {name} is {place} on the hub."] if place else [])


def test_every_repository_is_of_its_entry_and_is_found_by_its_own_name():
    for name in architectures.names():
        places = architectures.repositories(name)
        assert places and [architectures.lookup(place) for place in places] == [name] * len(places)
        assert [architectures.repository(place.split("/")[1]) for place in places] == places


def test_a_folder_of_a_well_known_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen2.5-0.5B").mkdir()
    (tmp_path / "elsewhere" / "Qwen3-4B").mkdir(parents=True)
    absolute, said = str(tmp_path / "Qwen2.5-0.5B"), []
    for written in ("Qwen2.5-0.5B", absolute):
        assert architectures.named(written, said.append) == written
        assert said.pop() == f"model: Qwen2.5-0.5B is the folder {absolute}, not Qwen/Qwen2.5-0.5B on the hub."
    # A path says by itself that it is meant.
    assert architectures.named("elsewhere/Qwen3-4B", said.append) == "elsewhere/Qwen3-4B" and not said


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
