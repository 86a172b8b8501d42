"""`lowvram-grpo train` with a recipe of Open R1's, with TRL's command line, and with `--use-peft false`: to the end."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from test_errors import sentence, train

from lowvram_grpo.cli import app
from lowvram_grpo.jobs.inference import find_whole_model, recipe_to_sample
from lowvram_grpo.run.directory import RunDirectory

OPEN_R1 = """
model_name_or_path: {model}
model_revision: main
torch_dtype: bfloat16
attn_implementation: flash_attention_2
dataset_name: {data}
dataset_prompt_column: problem
system_prompt: "a b c"
bf16: true
use_vllm: true
vllm_device: auto
vllm_gpu_memory_utilization: 0.7
do_eval: true
eval_strategy: steps
eval_steps: 2
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_model_id: tiny-grpo
hub_strategy: every_save
learning_rate: 1.0e-03
log_completions: true
log_level: error
logging_steps: 1
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_prompt_length: 64
max_completion_length: 8
max_steps: 2
num_generations: 4
output_dir: {out}
overwrite_output_dir: true
per_device_eval_batch_size: 8
per_device_train_batch_size: 4
push_to_hub: true
report_to:
- wandb
reward_funcs:
- accuracy
- format
- {reward}
reward_weights: [1.0, 0.5, 1.0]
save_strategy: "no"
seed: 42
warmup_ratio: 0.1
"""
REWARD = """
def digits(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(w.isdigit() for w in text.split())) for text in texts]
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe file of Open R1's kind beside its model, its data (with a split `test` where asked for) and a reward in
    a module of the working directory, as TRL's command line finds one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    (tmp_path / "my_digit_rewards.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "data").mkdir()

    def make(*, splits=("train", "test")):
        for split in splits:
            rows = [json.dumps({"problem": f"{c} b c", "solution": "$4$"}) for c in "abcdefgh"]
            (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        text = OPEN_R1.format(model=tmp_path / "model", data=tmp_path / "data", out=tmp_path / "run",
                              reward="my_digit_rewards.digits")  # fmt: skip
        (tmp_path / "config_full.yaml").write_text(text, encoding="utf-8")
        return {"--config": str(tmp_path / "config_full.yaml")}

    return make


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_recipe_of_open_r1_runs_as_it_is(monkeypatch, capsys, recipe, tmp_path):
    code, out, err = train(monkeypatch, capsys, recipe(), "--plain")
    assert code == 0, err
    run = tmp_path / "run"
    rows = rows_of(run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert {"rewards/accuracy_reward/mean", "rewards/format_reward/mean", "rewards/digits/mean"} <= rows[0].keys()
    assert [row["step"] for row in rows if "eval_reward" in row] == [2], "on the split test, TRL's default"
    assert out.count("not applied here") == 1 and out.count("vLLM is not installed") == 1
    assert "use_vllm has no effect" not in out and "\n  push_to_hub " in out
    page = (run / "not_applied.md").read_text(encoding="utf-8")
    assert "| `use_vllm`, `vllm_device`, `vllm_gpu_memory_utilization` | vLLM is not installed" in page
    assert "`use_peft`" in page and "`attn_implementation`" in page
    assert (run / "adapter" / "adapter_model.safetensors").is_file() and not list(run.glob("checkpoint-*"))
    written = (run / "recipe.toml").read_text(encoding="utf-8")
    assert "use_vllm" not in written and "push_to_hub" not in written


def test_without_a_split_to_evaluate_on_it_trains_all_the_same(monkeypatch, capsys, recipe, tmp_path):
    code, out, err = train(monkeypatch, capsys, recipe(splits=("train",)), "--plain")
    assert code == 0, err
    assert "nothing is evaluated: The dataset" in " ".join(out.split())
    assert not [row for row in rows_of(tmp_path / "run") if "eval_reward" in row]


def test_a_dry_run_lists_it_too(monkeypatch, capsys, recipe, tmp_path):
    code, out, _ = train(monkeypatch, capsys, recipe(), "--dry-run")
    assert code == 0 and "not applied here:\n" in out and not (tmp_path / "run").exists()


def test_trls_command_line(monkeypatch, capsys, recipe, tmp_path):
    recipe()
    line = (
        f"--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/data --dataset_train_split train --use_peft "
        f"--reward_funcs my_digit_rewards.digits think_format_reward --max_steps 1 --num_generations 4 --output_dir "
        f"{tmp_path}/run --per_device_train_batch_size 4 --max_completion_length 8 --lora_target_modules q_proj v_proj"
    )
    code, _, err = train(monkeypatch, capsys, {}, *line.split())
    assert code == 0, err
    row = rows_of(tmp_path / "run")[0]
    assert {"rewards/digits/mean", "rewards/think_format_reward/mean"} <= row.keys()


@pytest.fixture
def whole(monkeypatch, capsys, recipe, tmp_path):
    """A run that has trained all weights for two steps, a checkpoint at each."""
    options = recipe()
    flags = "--use_peft false --save_strategy steps --save_steps 1 --eval_strategy no --learning_rate 0.01 --beta 0.04"
    code, out, err = train(monkeypatch, capsys, options, "--plain", *flags.split())
    assert code == 0, err
    assert "use_peft" not in out
    return tmp_path / "run"


def test_all_weights_train_and_are_left_as_a_model(whole, tmp_path):
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(os.listdir(whole / "model"))
    assert not (whole / "adapter").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", whole / "model"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.8 * len(before), "not only an adapter's layers"
    assert after[moved[0]].dtype == torch.float32
    card = (whole / "model" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card and "of all weights" in card and "LoRA" not in card


def test_a_run_of_all_weights_goes_on_and_is_spoken_with(monkeypatch, capsys, whole, tmp_path):
    refused = train(monkeypatch, capsys, {"--resume": str(whole)})
    assert "is finished (2 of 2 steps)" in sentence(refused)
    assert "--use-peft can't change" in sentence(
        train(monkeypatch, capsys, {"--resume": str(whole)}, "--use-peft", "true")
    )
    code, _, err = train(monkeypatch, capsys, {"--resume": str(whole), "--max-steps": "3"}, "--plain")
    assert code == 0, err
    assert [row["step"] for row in rows_of(whole) if "loss" in row] == [1, 2, 3]

    said = []
    recipe = recipe_to_sample({"adapter": str(whole)}, said.append)
    assert recipe.model == str(whole / "model") and recipe.adapter is None and recipe.use_peft and not said
    assert find_whole_model(str(whole / "checkpoint-3"))[0] == str(whole / "checkpoint-3")
    evaluate = ["lowvram-grpo", "eval", "--adapter", str(whole), "--samples", "2", "--limit", "2", "--out", "scores"]
    monkeypatch.setattr("sys.argv", evaluate)
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 0, capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*evaluate[:-1], "again", "--compare-base"])
    with pytest.raises(SystemExit):
        app.main()
    assert "is a whole model: evaluate its base with --model" in capsys.readouterr().err


def test_a_run_of_an_adapter_is_no_whole_model(tmp_path):
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "recipe.toml").write_text("", encoding="utf-8")
    (folder / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert find_whole_model(str(folder)) is None and find_whole_model(str(folder / "adapter")) is None
    assert find_whole_model("owner/name") is None
    assert RunDirectory(folder).result_dir == folder / "adapter"
