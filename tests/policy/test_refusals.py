"""What is no model to train, as a person would give it by mistake: a sentence that says what it is and what to give."""

from __future__ import annotations

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from lowvram_grpo.errors import UserError
from lowvram_grpo.policy import hub, refusals
from lowvram_grpo.policy.load import load_causal_lm, load_tokenizer, model_config


def refusal(call, *arguments, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*arguments, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def configured(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    "config,words",
    [
        ({"model_type": "t5"}, "an encoder-decoder model"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "an encoder-decoder model"),
        ({"model_type": "whisper"}, "an encoder-decoder model"),
        ({"model_type": "qwen2_5_vl"}, "a vision-language model"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "an encoder, as embedding models are"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"]}, "an encoder, as embedding models are"),
        (
            {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]},
            "a masked language model (ModernBert",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "a classifier or reward model (LlamaForSequenceClassification)",
        ),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForTokenClassification"]},
            "a model for another task (Qwen2ForT",
        ),
        ({"model_type": "vit"}, "no causal language model (its model_type is 'vit')"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_other_kinds_of_models(tmp_path, config, words):
    folder = configured(tmp_path / "m", **config)
    text = refusal(model_config, folder)
    assert f"{folder!r} is {words}" in text and ", and GRPO here trains decoder-only language models" in text
    assert refusal(load_causal_lm, folder, device=torch.device("cpu"), dtype=torch.float32) == text


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]},
        {"model_type": "llama"},
        {"model_type": "qwen2", "architectures": ["Qwen2Model"]},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "gpt_neox"},  # is_decoder is false in its configuration, and means nothing
        {"model_type": "bert", "is_decoder": True},
        {"model_type": "bart", "is_encoder_decoder": False, "is_decoder": True, "architectures": ["BartForCausalLM"]},
    ],
    ids=lambda value: value["model_type"],
)
def test_what_writes_text_on_is_taken(tmp_path, config):
    assert model_config(configured(tmp_path / "m", **config)).model_type == config["model_type"]


@pytest.mark.parametrize("kind,inside", [("gemma3", "gemma3_text"), ("llava", "llama"), ("mistral3", "mistral")])
def test_of_a_multimodal_model_the_language_model_is_taken(tmp_path, kind, inside):
    folder = configured(tmp_path / "m", model_type=kind)
    config = model_config(folder)
    assert config.model_type == inside and config._name_or_path == folder


def test_a_model_with_code_of_its_own(tmp_path):
    from lowvram_grpo.plan.architectures import resolve_config

    folder = configured(tmp_path / "m", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    for call in (model_config, resolve_config):
        assert "then pass --trust-remote-code" in refusal(call, folder)
    (tmp_path / "m" / "mine.py").write_text(
        "from transformers import LlamaConfig\nclass Mine(LlamaConfig):\n    model_type = 'mine'\n", encoding="utf-8"
    )
    text = refusal(model_config, folder, trust_remote_code=True)
    assert "no causal language model (its model_type is 'mine')" in text
    configured(
        tmp_path / "m", model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}
    )
    assert model_config(folder, trust_remote_code=True).model_type == "mine"


def test_a_tokenizer_with_code_of_its_own(tmp_path):
    folder = configured(tmp_path / "m", model_type="llama")
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}), encoding="utf-8"
    )
    assert "then pass --trust-remote-code" in refusal(load_tokenizer, folder, trust_remote_code=False)


@pytest.fixture
def adapter(tmp_path):
    """RUN/adapter, of a run with a recipe."""
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "Qwen/Qwen2.5-0.5B"
    model.save_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "recipe.toml").write_text('model = "Qwen/Qwen2.5-0.5B"\n', encoding="utf-8")
    return tmp_path / "run" / "adapter"


def test_a_run_or_its_adapter_for_a_model(adapter):
    run = str(adapter.parent)
    text = refusal(model_config, run)
    assert f"{run!r} is a run, not a model" in text and f"--adapter {run};" in text and f"--resume {run} " in text
    assert f"--adapter {adapter} with --model Qwen/Qwen2.5-0.5B" in text
    text = refusal(model_config, str(adapter))
    assert "holds an adapter, not a model" in text and "with --model Qwen/Qwen2.5-0.5B" in text
    (adapter / "adapter_config.json").write_text("[", encoding="utf-8")
    assert "with --model its base model" in refusal(model_config, run)


def test_other_folders_without_a_model(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    assert "holds no model, as it has no config.json; name the folder" in refusal(model_config, str(folder))
    (folder / "a.gguf").touch()
    assert f"holds a GGUF file; name the file, as in --model {folder}/a.gguf" in refusal(model_config, str(folder))
    (folder / "b.gguf").touch()
    assert "holds GGUF files; name one of them" in refusal(model_config, str(folder))
    outer = tmp_path / "models--a--b"
    inner = outer / "snapshots" / "abc"
    inner.parent.mkdir(parents=True)
    configured(inner, model_type="llama")
    assert f"did you mean {inner}?" in refusal(model_config, str(outer))
    configured(outer / "checkpoint-2", model_type="llama")
    assert f"did you mean {outer / 'checkpoint-2'}?" in refusal(model_config, str(outer))


@pytest.mark.parametrize("content", ['{"model_type": "lla', "", "[]", "{}", '{"model_type": "nobody"}'])
def test_a_configuration_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    text = refusal(model_config, str(tmp_path))
    assert f"The folder {str(tmp_path)!r} does not hold a loadable model" in text


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "gemma3_text", "t5"])
@pytest.mark.parametrize("more", [{}, {"chat_template.jinja": "{{ messages }}"}, {"tokenizer_config.json": "{}"}])
def test_no_tokenizer_files(tmp_path, kind, more):
    """For some kinds transformers makes an empty tokenizer, for others it asks for sentencepiece."""
    folder = configured(tmp_path / "m", model_type=kind)
    for name, content in more.items():
        (tmp_path / "m" / name).write_text(content, encoding="utf-8")
    text = refusal(load_tokenizer, folder)
    assert f"{folder!r} has no tokenizer files; copy tokenizer.json and tokenizer_config.json" in text


def test_a_damaged_tokenizer(model_dir):
    from pathlib import Path

    Path(model_dir, "tokenizer.json").write_text('{"version"', encoding="utf-8")
    assert "does not hold a loadable tokenizer" in refusal(load_tokenizer, model_dir)


def rows(count):
    config = SimpleNamespace(vocab_size=count)
    return SimpleNamespace(get_text_config=lambda: config)


def test_tokens_without_an_embedding():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    for enough in (size, size + 64):
        refusals.check_rows("m", tokenizer, rows(enough))
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    refusals.check_rows("m", tokenizer, rows(size + 1))
    text = refusal(refusals.check_rows, "m", tokenizer, rows(size))
    assert "'m' has tokens" in text and "('<think>'; ids go up to 39, and there are 39 rows)" in text
    tokenizer.add_tokens(["one", "two", "three"])
    text = refusal(refusals.check_rows, "m", tokenizer, rows(size))
    assert "'<think>', 'one', 'two' and 1 more" in text and "resize_token_embeddings" in text
    # A tokenizer of another model: fewer of its tokens than rows, and yet beyond them.
    sparse = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 5000})
    assert "'b'" in refusal(refusals.check_rows, "m", sparse, rows(41))


@pytest.mark.parametrize("given", ["a name", "a model", "a tokenizer"])
def test_a_trainer_hears_of_them_before_anything_is_loaded(tmp_path, config, dataset, monkeypatch, given):
    from lowvram_grpo import GRPOTrainer

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "<answer>"])
    make_model(vocab_size=40).save_pretrained(tmp_path / "m")
    (make_tokenizer() if given == "a tokenizer" else tokenizer).save_pretrained(tmp_path / "m")
    monkeypatch.setattr("lowvram_grpo.policy.build.load_causal_lm", lambda *a, **k: pytest.fail("loaded"))
    model = make_model(vocab_size=40) if given == "a model" else str(tmp_path / "m")
    with pytest.raises(UserError, match=r"no embedding for \('</think>'"):
        GRPOTrainer(
            model,
            lambda completions, **kwargs: [0.0] * len(completions),
            config(),
            dataset,
            processing_class=None if given == "a name" else tokenizer,
        )


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A function that puts a folder into a hub cache under an id."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, name):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("a" * 40, encoding="utf-8")
        return shutil.copytree(folder, place / "snapshots" / ("a" * 40))

    return put


def test_hub_ids_in_the_cache(tmp_path, hub_cache, adapter):
    hub_cache(adapter, "me/lora")
    assert "'me/lora' holds an adapter" in refusal(model_config, "me/lora")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "q4.gguf").touch()
    hub_cache(tmp_path / "g", "me/gguf")
    assert "as in --model me/gguf/q4.gguf" in refusal(model_config, "me/gguf")
    hub_cache(configured(tmp_path / "n", model_type="nobody"), "me/new")
    assert "The model of 'me/new' on the hub can't be loaded" in refusal(model_config, "me/new")
    hub_cache(configured(tmp_path / "o", model_type="qwen2"), "me/bare")
    assert "'me/bare' has no tokenizer files" in refusal(load_tokenizer, "me/bare")
    make_model().save_pretrained(tmp_path / "both")
    shutil.copytree(adapter, tmp_path / "both", dirs_exist_ok=True)
    hub_cache(tmp_path / "both", "me/both")
    text = refusal(load_causal_lm, "me/both", device=torch.device("cpu"), dtype=torch.float32)
    assert "pass --adapter me/both with --model Qwen/Qwen2.5-0.5B" in text
    assert "nor in this machine's cache of it" in refusal(model_config, "me/nothing")


def caused(cause):
    error = OSError("what transformers says")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error,words",
    [
        (OSError("You are trying to access a gated repo.\nMake sure to have access to it"), "`hf auth login`"),
        (caused(PermissionError(errno.EACCES, "Permission denied")), "(Permission denied); set HF_HOME"),
        (OSError(errno.ENOSPC, "No space left on device"), "(No space left on device); set HF_HOME"),
        (OSError(errno.EROFS, "Read-only file system"), "can't be written to the hub's cache"),
        (
            ValueError("The checkpoint has model type `next` but Transformers does not"),
            "on the hub can't be loaded: The",
        ),
        (ImportError("requires the sentencepiece library"), "needs a package that is missing (requires"),
    ],
)
def test_other_trouble_with_the_hub(error, words):
    assert words in str(refusals.explained("meta-llama/Llama-3.2-1B", error))


def test_the_cache_alone_where_the_hub_does_not_answer(monkeypatch, tmp_path):
    from huggingface_hub import constants

    said, asked = [], []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.offline_where_unreachable([None, str(tmp_path)], said.append)
    assert not said and not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "_answers", lambda url: asked.append(url) or True)
    hub.offline_where_unreachable(["Qwen/Qwen2.5-0.5B"], said.append)
    assert asked == ["http://127.0.0.1:9"] and not said
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    hub.offline_where_unreachable(["Qwen/Qwen2.5-0.5B"], said.append)
    assert len(said) == 1 and "only this machine's cache" in said[0] and constants.HF_HUB_OFFLINE
    hub.offline_where_unreachable(["Qwen/Qwen2.5-0.5B"], said.append)
    assert len(said) == 1


def test_the_way_to_the_hub_is_the_one_that_is_barred(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_cut_off", False)
    with pytest.raises(UserError, match=r"or unset HF_HUB_OFFLINE, with which only the cache is looked at\.$"):
        load_tokenizer("nobody/nothing")
    monkeypatch.setattr(hub, "_cut_off", True)  # by us, for the hub did not answer
    with pytest.raises(UserError, match=r"or set HF_ENDPOINT to a mirror\.$"):
        load_tokenizer("nobody/nothing")
