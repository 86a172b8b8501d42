"""Recipes with Open R1's keys, on a machine that lacks what they ask for: what can't apply is listed once, the rest
holds. The files have its keys, and are ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lowvram_grpo.jobs import here
from lowvram_grpo.jobs.here import THIS_MACHINE, export, settle
from lowvram_grpo.jobs.implied import TRLS_SPLIT, imply
from lowvram_grpo.jobs.loading import dtype_of, fresh_lora, training_config
from lowvram_grpo.recipe.not_applied import NEVER
from lowvram_grpo.recipe.resolve import ALIASES, IGNORED, resolve

RECIPES = sorted((Path(__file__).parents[1] / "recipe" / "open_r1_recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """A desktop without trackers, without vLLM, and logged in to nothing."""
    import huggingface_hub
    from transformers import integrations

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: [])
    found = here.importlib.util.find_spec
    monkeypatch.setattr(here.importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")


def settled(file, **flags):
    recipe = resolve({"preset": "cpu", **flags}, file)
    settle(recipe)
    imply(recipe, lambda sentence: None)
    return recipe


def listed(recipe):
    return {key: row.reason for row in recipe.not_applied for key in row.keys}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_key_is_taken_or_listed(file):
    recipe = settled(file)
    args = training_config(recipe, weights=[1.0] * len(recipe.reward))
    table, missing = yaml.safe_load(file.read_text(encoding="utf-8")), []
    for key, value in table.items():
        name = ALIASES.get(key, key)
        taken = name in recipe.training or name in recipe.origin
        unset = value in (None, False, []) and key in NEVER
        if not (taken or key in listed(recipe) or name in listed(recipe) or key in IGNORED or unset):
            missing.append(key)
    assert not missing
    keys = [key for row in recipe.not_applied for key in row.keys]
    assert len(keys) == len(set(keys)), "each once"
    assert not args.use_vllm and not args.push_to_hub and args.report_to in ([], ["none"])
    assert not [notice for notice in args.notices() if "vllm" in notice], "not said again"
    assert recipe.attn_implementation is None and "a LoRA adapter" in listed(recipe)["use_peft"]


def test_what_it_says_of_the_one_for_programs():
    said = listed(settled(RECIPES[0]))
    assert "Slurm" in said["benchmarks"] and "hub_strategy" in said["callbacks"]
    assert (
        said["wandb_project"] == said["wandb_entity"] == said["report_to"] and "pip install wandb" in said["report_to"]
    )
    assert said["hub_revision"] == said["push_to_hub"] and "HF_TOKEN" in said["push_to_hub"]
    assert said["code_provider"] == "e2b: programs run in a sandbox on this machine" == f"e2b: {said['e2b_router_url']}"
    assert said["do_eval"] == said["eval_steps"] == "eval_strategy is no, and evaluations go by it"
    assert "morph_router_url" not in said, "nothing is asked for by null"


def test_the_rest_of_it_holds():
    recipe = settled(RECIPES[0])
    args = training_config(recipe, weights=[1.0, 1.0])
    assert recipe.reward == ["code", "code_format"] and args.reward_weights == [1.0, 0.1]
    assert (recipe.code_language, recipe.code_provider, recipe.parallel_code_exec_per_proc) == ("cpp", "local", 2)
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1} and args.warmup_ratio == 0.03
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False} and args.save_steps == 0.05
    assert args.scale_rewards == "none" and args.loss_type == "dr_grpo" and args.save_strategy == "steps"
    assert args.num_completions_to_print == 2 and args.log_level == "info" and args.eval_strategy == "no"
    full = settled(next(file for file in RECIPES if file.stem == "config_full"))
    args = training_config(full, weights=[1.0, 1.0])
    assert args.eval_strategy == "steps" and full.eval_split == "validation" and args.save_strategy == "no"
    assert full.chat_template.startswith("{%- for message in messages") and "dtype" in (full.origin | listed(full))


def test_what_the_machine_has_is_used(monkeypatch):
    import huggingface_hub
    from transformers import integrations

    from lowvram_grpo.policy import hub

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(hub, "out_of_reach", lambda: "")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(here.importlib.util, "find_spec", lambda name: object())
    recipe = resolve({"preset": "cpu"}, RECIPES[0])
    settle(recipe)
    assert recipe.training["use_vllm"] and recipe.training["report_to"] == ["wandb"] and recipe.training["push_to_hub"]
    assert recipe.training["hub_revision"] == "v01.00"
    assert not {"use_vllm", "report_to", "push_to_hub", "wandb_project"} & listed(recipe).keys()
    monkeypatch.setattr(hub, "out_of_reach", lambda: "the hub can't be reached")
    settle(recipe)
    assert listed(recipe)["push_to_hub"].startswith("the hub can't be reached") and "push_to_hub" not in recipe.training


def test_wandb_that_would_ask_for_a_key(monkeypatch, tmp_path):
    from transformers import integrations

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["wandb", "tensorboard"])
    (tmp_path / "r.yaml").write_text("report_to: [wandb, tensorboard]\nwandb_project: p\n", encoding="utf-8")
    recipe = settled(tmp_path / "r.yaml")
    assert recipe.training["report_to"] == ["tensorboard"] and recipe.origin["report_to"] == THIS_MACHINE
    assert "not logged in" in listed(recipe)["wandb_project"]
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password secret\n", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert settled(tmp_path / "r.yaml").training["report_to"] == ["wandb", "tensorboard"]


def test_a_flag_is_meant_here(tmp_path):
    """and refused where it can't be had."""
    from lowvram_grpo.errors import UserError

    (tmp_path / "r.yaml").write_text("use_vllm: true\nreport_to: wandb\n", encoding="utf-8")
    recipe = settled(tmp_path / "r.yaml", use_vllm="true", report_to="wandb")
    assert recipe.training["use_vllm"] is True and not recipe.not_applied
    with pytest.raises(UserError, match="report_to asks for wandb, which is not installed"):
        training_config(recipe, weights=[])


def test_a_vllm_server_that_is_named_is_kept(tmp_path):
    text = "use_vllm: true\nvllm_mode: server\nvllm_server_port: 8001\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert settled(tmp_path / "r.yaml").training["vllm_server_port"] == 8001


def test_the_environment_is_open_r1s_and_trls(tmp_path):
    import os

    text = "env:\n  SOME_TOKEN_OF_MINE: 12\nwandb_project: p\nwandb_run_group: g\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    recipe = resolve({}, tmp_path / "r.yaml")
    try:
        export(recipe)
        assert (os.environ["SOME_TOKEN_OF_MINE"], os.environ["WANDB_PROJECT"]) == ("12", "p")
        assert os.environ["WANDB_RUN_GROUP"] == "g" and "WANDB_ENTITY" not in os.environ
    finally:
        for name in ("SOME_TOKEN_OF_MINE", "WANDB_PROJECT", "WANDB_RUN_GROUP"):
            os.environ.pop(name, None)
    assert "SOME_TOKEN" not in recipe.to_toml() and 'wandb_project = "p"  # file' in recipe.to_toml()


def test_an_evaluation_without_a_split_is_trls(tmp_path):
    text = "dataset_name: somewhere\ndo_eval: true\neval_strategy: steps\neval_steps: 5\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    recipe = settled(tmp_path / "r.yaml")
    assert recipe.eval_split == "test" and recipe.origin["eval_split"] == TRLS_SPLIT
    (tmp_path / "r.yaml").write_text("dataset_test_split: test\ndo_eval: false\n", encoding="utf-8")
    assert settled(tmp_path / "r.yaml").training["eval_strategy"] == "no"


def test_all_weights_stay_float32(tmp_path, monkeypatch):
    import torch

    from lowvram_grpo.policy import load

    monkeypatch.setattr(load, "compute_dtype", lambda device: torch.bfloat16)

    (tmp_path / "r.yaml").write_text("use_peft: false\ntorch_dtype: bfloat16\nuse_vllm: true\n", encoding="utf-8")
    recipe = settled(tmp_path / "r.yaml", preset="8gb")
    assert recipe.quantization == "none"
    recipe.dtype = "auto"
    assert dtype_of(recipe, torch.device("cpu")) == torch.float32
    assert "stay float32" in listed(recipe)["dtype"] and "all weights are trained" in listed(recipe)["use_vllm"]


def test_trls_adapter_settings(tmp_path):
    text = "use_peft: true\nlora_r: 4\nuse_rslora: true\nuse_dora: true\nlora_modules_to_save: [norm]\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    config = fresh_lora(settled(tmp_path / "r.yaml"))
    assert config.r == 4 and config.use_rslora and config.use_dora and config.modules_to_save == ["norm"]
