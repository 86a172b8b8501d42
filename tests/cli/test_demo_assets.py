"""What the wheel brings for `lowvram-grpo demo`: a model that half knows its task, prompts, a recipe that fits both."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "lowvram_grpo" / "demo"
JOB_KEYS = {"model", "data", "prompt_column", "answer_column", "reward", "quantization", "lora_r", "lora_alpha"}
WORKED = "7+5=12 10+20=30 <answer>42</answer>"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with open(DEMO / "prompts.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def recipe() -> dict:
    return tomllib.loads((DEMO / "recipe.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_demo_model", ROOT / "scripts" / "make_demo_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_small_and_in_half_precision():
    from safetensors import safe_open

    weights = DEMO / "model" / "model.safetensors"
    assert weights.stat().st_size <= 3 * 2**20
    with safe_open(weights, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_model_and_tokenizer_agree(model, tokenizer):
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.bos_token_id == tokenizer.bos_token_id


def test_tokenizer_round_trip(tokenizer, rows):
    for text in [WORKED, "<answer>7</answer>", "no idea", *(row["prompt"] for row in rows)]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_unknown_characters_become_unk(tokenizer):
    assert tokenizer("1é\n")["input_ids"][2:] == [tokenizer.unk_token_id] * 2


def test_prompts_are_different_sums_with_their_answers(rows):
    assert len(rows) == len({row["prompt"] for row in rows}) >= 256
    for row in rows:
        assert row.keys() == {"prompt", "answer"}
        a, b = row["prompt"].removesuffix("=").split("+")
        assert row["answer"] == str(int(a) + int(b))


def test_the_script_makes_these_prompts_and_leaves_them_out_of_the_corpus(rows, script):
    demo, corpus = script.split_sums(random.Random(script.SEED))
    assert [script.prompt_of(a, b) for a, b in demo] == [row["prompt"] for row in rows]
    assert not set(demo) & set(corpus)
    assert len(demo) + len(corpus) == len(script.OPERANDS) ** 2


def test_the_script_makes_this_tokenizer(tokenizer, script):
    assert script.build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_every_habit_fits_the_length_limit(tokenizer, recipe, script):
    rng = random.Random(0)
    for habit in script.HABITS:
        longest = max(len(tokenizer(habit(99, 99, rng), add_special_tokens=False)["input_ids"]) for _ in range(20))
        assert longest + 1 <= recipe["max_completion_length"] == script.MAX_REPLY


def test_the_model_is_right_sometimes(model, tokenizer, rows, recipe):
    """Neither never nor always: else all groups would be dead, or there would be nothing left to learn."""
    from lowvram_grpo.rewards.maths import accuracy

    rows = rows[:64]
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    limit = recipe["max_completion_length"]
    out = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=limit, num_return_sequences=4)
    replies = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = accuracy(replies, [row["answer"] for row in rows for _ in range(4)])
    assert 0.18 < sum(right) / len(right) < 0.42


def test_the_recipe_names_what_exists(recipe):
    from lowvram_grpo.recipe.config import GRPOConfig
    from lowvram_grpo.rewards.registry import BUILTIN, resolve_reward

    assert (DEMO / recipe["model"] / "config.json").is_file() and (DEMO / recipe["data"]).is_file()
    assert all(resolve_reward(spec)[0] in BUILTIN.values() for spec in recipe["reward"])
    assert recipe.keys() <= JOB_KEYS | {field.name for field in fields(GRPOConfig)}


def test_the_recipe_steps_over_whole_groups(recipe, tmp_path):
    from lowvram_grpo.recipe.config import GRPOConfig

    settings = {key: value for key, value in recipe.items() if key not in JOB_KEYS}
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    plan = config.batch_plan()
    assert (plan.prompts_per_rollout, plan.num_generations, plan.micro_batch_size) == (8, 8, 64)
    assert config.notices() == []
