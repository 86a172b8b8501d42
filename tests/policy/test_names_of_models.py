"""What a name means: with the table, with what the hub's cache has, and where it is open."""

from __future__ import annotations

import json

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy import hub
from lowvram_grpo.policy.model_names import named, told_of_shape, unclear_shape


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts models (their configurations) into a hub cache of the test's own, which starts empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(*models, config='{"model_type": "llama"}'):
        for model in models:
            place = tmp_path / "hub" / f"models--{model.replace('/', '--')}"
            snapshot = place / "snapshots" / ("0123456789" * 4)
            snapshot.mkdir(parents=True)
            (place / "refs").mkdir()
            (place / "refs" / "main").write_text(snapshot.name, encoding="utf-8")
            if config:
                (snapshot / "config.json").write_text(config, encoding="utf-8")

    return put


def heard(model):
    said = []
    return named(model, said.append), said


def test_a_folder_of_a_well_known_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen2.5-0.5B").mkdir()
    (tmp_path / "elsewhere" / "Qwen3-4B").mkdir(parents=True)
    absolute, said = str(tmp_path / "Qwen2.5-0.5B"), []
    for written in ("Qwen2.5-0.5B", absolute):
        assert named(written, said.append) == written
        assert said.pop() == f"model: Qwen2.5-0.5B is the folder {absolute}, not Qwen/Qwen2.5-0.5B on the hub."
    # A path says by itself that it is meant.
    assert named("elsewhere/Qwen3-4B", said.append) == "elsewhere/Qwen3-4B" and not said


@pytest.mark.parametrize(
    "name,place,kind",
    [
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", "a base model (Qwen/Qwen2.5-0.5B-Instruct is tuned)"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", "a tuned model (Qwen/Qwen2.5-0.5B is its base)"),
        ("qwen3.5:4b", "Qwen/Qwen3.5-4B", "a tuned model (Qwen/Qwen3.5-4B-Base is its base)"),
        ("gemma-4-e2b", "google/gemma-4-E2B", "a base model (google/gemma-4-E2B-it is tuned)"),
        ("LFM2-350M", "LiquidAI/LFM2-350M", "a tuned model"),
    ],
)
def test_what_was_taken_is_said(cache, name, place, kind):
    assert heard(name) == (place, [f"model: {name} is {place} on the hub, {kind}."])


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "./Qwen2.5-0.5B", "x.gguf", "gpt2", "MiniMind2"])
def test_other_names_are_left_alone(cache, name):
    assert heard(name) == (name, [])


@pytest.mark.parametrize(
    "name,sentence",
    [
        ("qwen2.5", "could mean Qwen2.5-0.5B, Qwen2.5-1.5B, Qwen2.5-3B, Qwen2.5-7B or Qwen2.5-14B; name one"),
        ("gemma-4", "could mean Gemma-4-E2B, Gemma-4-E4B, Gemma-4-26B-A4B or Gemma-4-31B; name one"),
        ("qwen3:30b", "no model's whole name; did you mean Qwen3-30B-A3B"),
        ("qwen", r"could mean .* or \d+ more; name one"),
        ("qwen2.5:0.5b", r"could mean Qwen2.5-0.5B \(base\) or Qwen2.5-0.5B-Instruct \(tuned\); name one"),
        ("Gemma-3-4B", r"could mean gemma-3-4b-it \(tuned\) or gemma-3-4b-pt \(base\)"),
        ("Phi-4-mini", "could mean Phi-4-mini-instruct .* or Phi-4-mini-reasoning"),
        ("Qwen3-4B-Instruct", "There is no .*; did you mean Qwen3-4B-Instruct-2507"),
        ("Qwen3-4B-2507", "could mean Qwen3-4B-Instruct-2507 .* or Qwen3-4B-Thinking-2507"),
        ("qwen3:4b", "could mean Qwen3-4B .*, Qwen3-4B-Instruct-2507 .* or Qwen3-4B-Thinking-2507"),
        ("Qwen2.5-Math-3B", "could mean Qwen2.5-3B .*Qwen2.5-Coder-3B-Instruct"),
        (
            "Qwen2.5-0.5B-Instruct-bnb-4bit",
            "as in unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit, or pass --model Qwen2.5-0.5B-Instruct with --quantization",
        ),
    ],
)
def test_a_name_that_leaves_it_open_is_a_question(cache, name, sentence):
    with pytest.raises(UserError, match=sentence):
        named(name, lambda said: None)


def test_what_only_the_tuning_leaves_open_has_a_shape(cache):
    said = []
    for name in ("Gemma-3-4B", "qwen2.5:0.5b", "Qwen2.5-7B-Instruct-bnb-4bit"):
        assert unclear_shape(name) is None
        told_of_shape(name, said.append)
    asked = "train, chat and eval ask for one of"
    assert said == [
        f"model: Gemma-3-4B is planned as Gemma-3-4B; {asked} google/gemma-3-4b-it or google/gemma-3-4b-pt.",
        f"model: qwen2.5:0.5b is planned as Qwen2.5-0.5B; {asked} Qwen/Qwen2.5-0.5B or Qwen/Qwen2.5-0.5B-Instruct.",
    ]


def test_a_model_of_the_cache_is_found_by_its_name(cache):
    cache("jingyaogong/MiniMind2", "somebody/Qwen2.5-Math-3B", "somebody/other")
    for name in ("MiniMind2", "minimind2"):
        assert heard(name) == (
            "jingyaogong/MiniMind2",
            [f"model: {name} is jingyaogong/MiniMind2 in this machine's cache of the hub."],
        )
    # The table knows the shape, and nobody's repository of that name; the cache does.
    assert heard("Qwen2.5-Math-3B")[0] == "somebody/Qwen2.5-Math-3B"
    cache("elsewhere/minimind2")
    with pytest.raises(UserError, match=r"could mean elsewhere/minimind2 or jingyaogong/MiniMind2, which are in this"):
        named("MiniMind2", lambda said: None)


def test_what_the_cache_began_to_fetch_is_not_in_it(cache):
    cache("jingyaogong/MiniMind2", config=None)
    assert heard("MiniMind2") == ("MiniMind2", [])


def test_offline_a_mirror_is_taken_and_said(cache):
    cache("unsloth/Qwen2.5-0.5B", "unsloth/Qwen2.5-0.5B-Instruct")
    place, said = heard("Qwen2.5-0.5B")
    assert place == "unsloth/Qwen2.5-0.5B" and "so unsloth/Qwen2.5-0.5B is taken, which is the same" in said[0]
    cache("Qwen/Qwen2.5-0.5B")
    assert heard("Qwen2.5-0.5B")[0] == "Qwen/Qwen2.5-0.5B"


def test_offline_another_tuning_is_never_taken(cache):
    cache("Qwen/Qwen2.5-0.5B-Instruct", "unsloth/Qwen2.5-0.5B-Instruct", "unsloth/Qwen2.5-0.5B-bnb-4bit")
    assert heard("Qwen2.5-0.5B")[0] == "Qwen/Qwen2.5-0.5B"


def test_offline_an_upload_of_somebody_is_a_question(cache):
    cache("somebody/Qwen2.5-0.5B")
    with pytest.raises(UserError, match=r"the cache has somebody/Qwen2.5-0.5B, whose weights may be others"):
        named("Qwen2.5-0.5B", lambda said: None)


def test_where_the_hub_answers_the_model_itself_is_meant(cache, monkeypatch):
    from huggingface_hub import constants

    cache("unsloth/Qwen2.5-0.5B", "somebody/Qwen2.5-0.5B")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", lambda endpoint: True)
    assert heard("Qwen2.5-0.5B")[0] == "Qwen/Qwen2.5-0.5B"


def test_a_quantized_model_is_planned_as_it_is_stored(cache):
    from lowvram_grpo.plan.architectures import resolve_config
    from lowvram_grpo.policy.quantization import quantization_name

    for name, kind in (("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "nf4"), ("Qwen/Qwen2.5-7B-Instruct-AWQ", "awq")):
        config, source = resolve_config(name)
        assert quantization_name(config.quantization_config) == kind and "table" in source
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    cache(
        "unsloth/Qwen2.5-7B-Instruct-bnb-4bit",
        config=json.dumps({"model_type": "llama", "hidden_size": 64, "quantization_config": stored}),
    )
    for name in ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "Qwen2.5-7B-Instruct-bnb-4bit"):
        config, source = resolve_config(name)
        assert quantization_name(config.quantization_config) == "int8" and config.hidden_size == 64
        assert source == f"this machine's cache of the hub ({name})"
