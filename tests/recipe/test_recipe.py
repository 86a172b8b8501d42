"""defaults < preset < recipe file < flags, with every value cast and every key known."""

from __future__ import annotations

import pytest

from lowvram_grpo.cli.flags import parse_extra
from lowvram_grpo.errors import UserError
from lowvram_grpo.recipe.resolve import resolve

TRL_YAML = """
model_name_or_path: Qwen/Qwen2.5-0.5B
torch_dtype: bfloat16
dataset_name: trl-lib/tldr
dataset_train_split: train
load_in_4bit: true
use_peft: true
lora_r: 8
lora_target_modules: [q_proj, v_proj]
learning_rate: 1e-6
weight_decay: 0.1
num_generations: 16
reward_funcs:
  - accuracy
  - format:0.5
report_to: none
"""


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "grpo.yaml"
    path.write_text(TRL_YAML, encoding="utf-8")
    return path


def test_a_mistake_in_a_recipe_is_one_short_sentence(tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-6\n  beta: [0.1\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"r\.yaml' is not valid: mapping values are not allowed here \(line 2, column 7\)\.$"
    ):
        resolve({}, tmp_path / "r.yaml")


def test_a_trl_recipe_is_understood(yaml_file):
    recipe = resolve({}, yaml_file)
    assert (recipe.model, recipe.data, recipe.split) == ("Qwen/Qwen2.5-0.5B", "trl-lib/tldr", "train")
    assert (recipe.quantization, recipe.dtype, recipe.lora_r) == ("nf4", "bfloat16", 8)
    assert recipe.lora_target_modules == ["q_proj", "v_proj"] and recipe.reward == [
        "accuracy_reward",
        "format_reward:0.5",
    ]
    assert recipe.training["learning_rate"] == 1e-6 and recipe.training["num_generations"] == 16
    assert recipe.training["report_to"] == "none"


def test_later_layers_win_and_are_named(yaml_file):
    recipe = resolve({"learning_rate": "3e-5", "preset": "8gb"}, yaml_file)
    assert recipe.training["learning_rate"] == 3e-5 and recipe.origin["learning_rate"] == "flag"
    assert recipe.training["num_generations"] == 16 and recipe.origin["num_generations"] == "file"
    assert recipe.training["optim"] == "adamw_8bit" and recipe.origin["optim"] == "preset 8gb"
    assert recipe.training["cold_start"] == "auto" and recipe.origin["cold_start"] == "default"


def test_a_written_recipe_resolves_to_itself(yaml_file, tmp_path):
    flags = {"system_prompt": 'two\nlines and a "quote"', "bf16": "true", "chat_template_kwargs": '{"thinking": false}'}
    first = resolve(flags, yaml_file)
    (tmp_path / "recipe.toml").write_text(first.to_toml(), encoding="utf-8")
    assert resolve({}, tmp_path / "recipe.toml") == first
    assert first.training["chat_template_kwargs"] == {"thinking": False}


def test_flags_of_the_config():
    line = "--learning-rate 1e-5 --num_generations=4 --bf16 --no-self-test --max-prompt-length -1"
    assert parse_extra([*line.split(), "--reward-weights", "1", "--reward-weights", "2"]) == {
        "learning_rate": "1e-5",
        "num_generations": "4",
        "bf16": "true",
        "self_test": "false",
        "max_prompt_length": "-1",
        "reward_weights": ["1", "2"],
    }
    assert resolve({"reward_weights": ["1", "2"]}).training["reward_weights"] == [1.0, 2.0]
    assert resolve({"reward_weights": "1,0.5"}).training["reward_weights"] == [1.0, 0.5]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--lerning-rate", "1"], "--learning-rate"),
        (["stray"], "stray"),
        (["--learning-rate"], "needs a value"),
        (["--no-such-thing"], "--no-such-thing"),
        (["--modle", "x"], "'--model'"),
        (["--beta", "1", "2"], "Unexpected argument '2'"),
    ],
)
def test_wrong_flags(arguments, words):
    with pytest.raises(UserError, match=words):
        parse_extra(arguments)


@pytest.mark.parametrize(
    "text,name,words",
    [
        ("learning_rate = ", "r.toml", "not valid"),
        ("- a\n- b\n", "r.yaml", "table"),
        ("model: [1, 2", "r.yml", "not valid"),
        ("num_generations = 4.5\n", "r.toml", "num_generations"),
        ("vllm_modee = 'x'\n", "r.toml", "vllm_mode"),
        ("1: 2\n", "r.yaml", "Unknown setting 1"),
        ("use_peft: false\nload_in_4bit: true\n", "r.yaml", "quantization nf4 needs a frozen base"),
        ("env: WANDB_MODE\n", "r.yaml", "must be a table of environment variables"),
    ],
)
def test_wrong_files(tmp_path, text, name, words):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        resolve({}, tmp_path / name)


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes("beta = 1  # 好".encode("gbk"))
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 0xba in line 1\); save it as UTF-8"):
        resolve({}, path)
    for encoding in ("utf-8-sig", "utf-16"):  # Notepad's two
        path.write_bytes("beta = 0.5\r\n".encode(encoding))
        assert resolve({}, path).training["beta"] == 0.5


def test_null_is_a_value_that_survives_the_written_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("max_prompt_length: null\n", encoding="utf-8")
    first = resolve({"chat_template_kwargs": '{"a": null, "b": {"c": 1}}'}, tmp_path / "r.yaml")
    assert first.training["max_prompt_length"] is None
    assert resolve({"max_prompt_length": "none"}).training["max_prompt_length"] is None
    (tmp_path / "recipe.toml").write_text(first.to_toml(), encoding="utf-8")
    assert resolve({}, tmp_path / "recipe.toml") == first
    assert "max_prompt_length" not in resolve({"max_prompt_length": None}).training


def test_words_that_yaml_1_1_takes_for_bools(tmp_path):
    text = "cold_start: off\nsave_strategy: no\nbf16: yes\nself_test: false\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    training = resolve({}, tmp_path / "r.yaml").training
    assert (training["cold_start"], training["save_strategy"]) == ("off", "no")
    assert training["bf16"] is True and training["self_test"] is False


@pytest.mark.parametrize(
    "settings,quantization",
    [
        ({}, "nf4"),
        ({"load_in_4bit": False}, "none"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "int8"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "int8"),
    ],
)
def test_trl_quantization_flags_beat_the_preset(settings, quantization):
    assert resolve({"preset": "8gb", **settings}).quantization == quantization


def test_job_keys_are_flags_in_trls_spelling_too():
    line = "--lora_r 8 --prompt_column=q --model_name_or_path m --load-in-4bit --use_peft"
    recipe = resolve(parse_extra(line.split()))
    assert (recipe.lora_r, recipe.prompt_column, recipe.model, recipe.quantization) == (8, "q", "m", "nf4")


def test_of_a_flag_given_twice_the_last_counts_unless_it_is_a_list():
    line = "--max-steps 2 --max_steps=5 --bf16 --no-bf16 --report-to a --report-to b --reward_funcs x --reward_funcs y"
    found = parse_extra(line.split())
    assert found == {"max_steps": "5", "bf16": "false", "report_to": ["a", "b"], "reward_funcs": ["x", "y"]}
    assert resolve(found).training["max_steps"] == 5
    assert parse_extra(["--chat-template-kwargs", "{}", "--chat-template-kwargs", '{"a": 1}']) == {
        "chat_template_kwargs": '{"a": 1}'
    }


def test_lists_as_trls_command_line_takes_them():
    line = "--reward_funcs pkg.rewards.f accuracy_reward --lora_target_modules q_proj v_proj --benchmarks a b --bf16"
    found = parse_extra([*line.split(), "--reward_funcs", "third"])
    assert found["reward_funcs"] == ["pkg.rewards.f", "accuracy_reward", "third"] and found["bf16"] == "true"
    recipe = resolve({**found, **parse_extra(["--reward_model_name_or_path", "some/model", "--use_peft", "false"])})
    assert recipe.reward == ["some/model", "pkg.rewards.f", "accuracy_reward", "third"]
    assert recipe.lora_target_modules == ["q_proj", "v_proj"] and recipe.use_peft is False
    assert [row.keys for row in recipe.not_applied] == [("benchmarks",)]


def test_all_weights_in_a_written_recipe(tmp_path):
    first = resolve({"preset": "8gb", "use_peft": "false"})
    assert first.quantization == "none" and first.origin["quantization"] == "training of all weights"
    (tmp_path / "recipe.toml").write_text(first.to_toml(), encoding="utf-8")
    assert resolve({}, tmp_path / "recipe.toml") == first


def test_local_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "plain", "accuracy", "owner/model"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("d.jsonl", "r.py", "t.jinja", "shots.json"):
        (tmp_path / name).touch()
    rewards = ["r.py:f:0.5", "m:2", "accuracy:0.5", "owner/reward-model", " ./r.py:g"]
    local = resolve(
        {"model": "./m", "data": "d.jsonl", "adapter": "owner/model", "chat_template": "t.jinja", "reward": rewards,
         "few_shot": "shots.json", "eval_data": "../" + tmp_path.name + "/d.jsonl"}
    )  # fmt: skip
    here = str(tmp_path)
    assert (local.model, local.data, local.eval_data) == (f"{here}/m", f"{here}/d.jsonl", f"{here}/d.jsonl")
    assert (local.adapter, local.few_shot) == (f"{here}/owner/model", f"{here}/shots.json")
    assert local.chat_template == f"{here}/t.jinja"
    assert local.reward == [f"{here}/r.py:f:0.5", f"{here}/m:2", "accuracy:0.5", "owner/reward-model", f"{here}/r.py:g"]
    named = resolve(
        {"model": "Qwen/Qwen2.5-0.5B", "data": "trl-lib/tldr", "chat_template": "plain", "data_config": "m"}
    )
    assert (named.model, named.data, named.chat_template) == ("Qwen/Qwen2.5-0.5B", "trl-lib/tldr", "plain")
    assert named.data_config == "m"


def test_a_zero_on_the_command_line_is_a_value(tmp_path, monkeypatch):
    from lowvram_grpo.cli.train import start
    from lowvram_grpo.jobs import train as job

    (tmp_path / "r.toml").write_text("lora_dropout = 0.1\n", encoding="utf-8")
    seen = []
    monkeypatch.setattr(job, "run", lambda recipe, *, dry_run: seen.append((recipe.lora_dropout, dry_run)))
    start({"lora_dropout": 0.0, "plain": False}, [], config=tmp_path / "r.toml", resume=None, dry_run=True)
    assert seen == [(0.0, True)]


def test_every_preset_resolves():
    from lowvram_grpo import GRPOConfig
    from lowvram_grpo.recipe import preset

    assert preset.names() == ["4gb", "6gb", "8gb", "12gb", "16gb", "24gb", "cpu"]
    for name in preset.names():
        recipe = resolve({"preset": name})
        assert recipe.preset == name and recipe.training.keys() <= set(GRPOConfig.__dataclass_fields__)
        assert preset.load(name).summary


def test_the_automatic_preset_follows_the_card(monkeypatch):
    from lowvram_grpo.memory import devices
    from lowvram_grpo.recipe import preset

    def card(gib):
        return devices.Device("cuda", "card", 0, int(gib * 2**30), int(gib * 2**30), (8, 6), True)

    for gib in (4, 8, 24):
        monkeypatch.setattr(devices, "detect", lambda gib=gib: card(gib))
        assert preset.pick() == f"{gib}gb"
        assert resolve({}).preset == f"{gib}gb"
    monkeypatch.undo()
    assert preset.pick() == "cpu"


def test_a_presets_prompts_per_step_gives_way_to_trl_batch_sizes():
    assert "prompts_per_step" in resolve({"preset": "8gb"}).training
    trl = resolve({"preset": "8gb", "per_device_train_batch_size": "4", "gradient_accumulation_steps": "16"})
    assert "prompts_per_step" not in trl.training
    both = resolve({"preset": "8gb", "gradient_accumulation_steps": "16", "prompts_per_step": "3"})
    assert both.training["prompts_per_step"] == 3


INLINE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] + \"\\t\" }}é{% endfor %}{# "
    + "long " * 60
    + "#}"
)


@pytest.mark.parametrize("name", ["r.yaml", "r.toml"])
def test_an_inline_chat_template_survives_the_written_recipe(tmp_path, name):
    import tomli_w
    import yaml

    text = yaml.safe_dump({"chat_template": INLINE}) if name == "r.yaml" else tomli_w.dumps({"chat_template": INLINE})
    (tmp_path / name).write_text(text, encoding="utf-8")
    first = resolve({}, tmp_path / name)
    assert first.chat_template == INLINE
    (tmp_path / "recipe.toml").write_text(first.to_toml(), encoding="utf-8")
    assert resolve({}, tmp_path / "recipe.toml") == first
    assert resolve({"chat_template": INLINE}).chat_template == INLINE


@pytest.mark.parametrize(
    "key,text,table",
    [
        ("chat_template_kwargs", "enable_thinking=false", {"enable_thinking": False}),
        ("chat_template_kwargs", "enable_thinking=False, mode=short", {"enable_thinking": False, "mode": "short"}),
        ("generation_kwargs", "min_new_tokens=4,note=null", {"min_new_tokens": 4, "note": None}),
        ("lr_scheduler_kwargs", "min_lr_rate=1e-1", {"min_lr_rate": 0.1}),
        ("chat_template_kwargs", '{"a": {"b": [1]}}', {"a": {"b": [1]}}),
    ],
)
def test_arguments_are_json_or_names_with_values(key, text, table):
    assert resolve({key: text}).training[key] == table


@pytest.mark.parametrize("text", ["enable_thinking", "a=1,2", "a=[1,2]", "{a: 1}", "[1]", "a=", "a='x'", "1=2"])
def test_arguments_that_are_neither_are_refused_with_both_forms(text):
    with pytest.raises(UserError, match=r"no table of arguments; write it as JSON, '\{\"name\": false\}'.*name=false"):
        resolve({"chat_template_kwargs": text})
