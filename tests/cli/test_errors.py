"""Whatever a person gets wrong: one sentence that names the cause and the fix, exit code 2, and no traceback."""

from __future__ import annotations

import json
import os
import sys

import pytest

from lowvram_grpo.cli import app


def train(monkeypatch, capsys, job, *extra, **replaced):
    """(exit code, stdout, stderr) of `lowvram-grpo train`; an option replaced by None is left out."""
    options = {**job, **{f"--{k.replace('_', '-')}": v for k, v in replaced.items()}}
    arguments = [part for k, v in options.items() if v is not None for part in (k, v)]
    monkeypatch.setattr(sys, "argv", ["lowvram-grpo", "train", *arguments, *extra])
    with pytest.raises(SystemExit) as stop:
        app.main()
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


def sentence(result):
    """The one line on stderr of a run that ended with code 2."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_the_job_itself_runs(monkeypatch, capsys, job, tmp_path):
    code, out, _ = train(monkeypatch, capsys, job)
    assert code == 0 and "step 1/1" in out
    run = tmp_path / "run"
    assert {"recipe.toml", "metrics.jsonl", "completions.jsonl", "adapter", "checkpoint-1"} <= set(os.listdir(run))
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} <= set(os.listdir(run / "adapter"))
    row = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["step"] == 1 and "rewards/digits/mean" in row


def test_dry_run_writes_nothing(monkeypatch, capsys, job, tmp_path):
    code, out, _ = train(monkeypatch, capsys, job, "--dry-run")
    assert code == 0 and "a b c" in out and "2 prompts x 4 completions" in out and not (tmp_path / "run").exists()


def test_a_dry_run_says_that_an_adapter_has_no_reference_to_offload(monkeypatch, capsys, job):
    said = "note: reference_offload has no effect: the reference shares the policy's weights, but for an adapter.\n"
    assert said in train(monkeypatch, capsys, job, "--dry-run", "--reference-offload")[1]
    assert said not in train(monkeypatch, capsys, job, "--dry-run")[1]


def test_dry_run_counts_the_prompts_that_would_be_cut(monkeypatch, capsys, job):
    _, out, _ = train(monkeypatch, capsys, job, "--dry-run", max_prompt_length="2")
    assert "4 of 8 prompts are longer than max_prompt_length 2 and lose the left end" in " ".join(out.split())
    assert "longer than" not in train(monkeypatch, capsys, job, "--dry-run", max_prompt_length="3")[1]


@pytest.mark.parametrize(
    "replaced,words",
    [
        ({"model": "/no/such/model"}, ["/no/such/model"]),
        ({"model": "nobody/nothing"}, ["nobody/nothing", "hub"]),
        ({"data": "/no/such/data.jsonl"}, ["/no/such/data.jsonl", "does not exist"]),
        ({"prompt_column": "question"}, ["question", "prompt, answer"]),
        ({"answer_column": "solution"}, ["solution", "prompt, answer"]),
        ({"reward": "acuracy"}, ["acuracy", "accuracy"]),
        ({"reward": "missing_file.py:f"}, ["missing_file.py"]),
        ({"template": "tdlr"}, ["tdlr", "tldr"]),
        ({"system_prompt": "be brief"}, ["chat template", "--chat-template plain"]),
        ({"max_prompt_length": "100", "max_completion_length": "126"}, ["128 positions", "max_completion_length"]),
        ({"lerning_rate": "1"}, ["--lerning-rate", "--learning-rate"]),
        ({"num_generations": "1"}, ["num_generations", "at least 2"]),
        ({"num_generations": "many"}, ["num_generations", "int"]),
        ({"attn_implementation": "sdpaa"}, ["attn_implementation is 'sdpaa'", "sdpa", "eager"]),
        ({"attn_implementation": "flash_attention_2"}, ["missing", "lash", "--attn-implementation sdpa"]),
        ({"attention": "flash"}, ["attention is 'flash'", "auto, sdpa, xformers"]),
        ({"attention": "xformers"}, ["attention is xformers", "CPU", "set attention to auto or sdpa"]),
        ({"reward_weights": "1,2"}, ["reward_weights has 2", "1 rewards"]),
        ({"eval_strategy": "epoch"}, ["eval_strategy is epoch", "--eval-data"]),
        ({"quantization": "int3"}, ["quantization", "nf4"]),
        ({"preset": "9gb"}, ["9gb", "8gb"]),
        ({"config": "/no/such/recipe.toml"}, ["/no/such/recipe.toml"]),
        ({"output_dir": "/proc/version/run"}, ["/proc/version/run", "--output-dir"]),
        ({"adapter": "/no/such/adapter"}, ["/no/such/adapter"]),
        ({"resume": "/no/such/run"}, ["/no/such/run"]),
        ({"bf16": "true", "fp16": "true"}, ["bf16 and fp16 are both set"]),
        ({"load_best_model_at_end": "true"}, ["nothing is evaluated", "--eval-data"]),
        ({"learning_rate": "nan"}, ["at least 0, and finite"]),
        ({"report_to": "comet_ml"}, ["comet_ml", "pip install"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_one_clear_sentence(monkeypatch, capsys, job, replaced, words):
    text = sentence(train(monkeypatch, capsys, job, **replaced))
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    "flag,value",
    [
        ("learning_rate", "nan"),
        ("max_steps", "-5"),
        ("temperature", "0"),
        ("lora_r", "0"),
        ("attn_implementation", "sdpaa"),
        ("attention", "xformers"),
        ("adapter", "{tmp}"),
    ],
)
def test_a_dry_run_finds_it_and_a_run_before_it_writes(monkeypatch, capsys, job, tmp_path, flag, value):
    value = value.format(tmp=tmp_path)
    for extra in (["--dry-run"], []):
        assert value in sentence(train(monkeypatch, capsys, job, *extra, **{flag: value}))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "function,words",
    [
        ("raises", ["raises", "KeyError", "oops"]),
        ("short", ["short", "1", "8"]),
        ("nan", ["nan"]),
        ("nowhere", ["digits"]),
    ],
)
def test_a_reward_that_fails_is_named(monkeypatch, capsys, job, function, words):
    text = sentence(train(monkeypatch, capsys, job, reward=job["--reward"].replace("digits", function)))
    for word in words:
        assert word in text, text


@pytest.fixture
def no_loading(monkeypatch):
    """Whatever is wrong has to be found before the weights are read."""

    def load(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("lowvram_grpo.policy.load.load_causal_lm", load)


@pytest.mark.parametrize(
    "reward,words",
    [
        ("content", ["'content' needs 'answer'", "columns found: gold", "--answer-column"]),
        ("accuracy", ["'accuracy' needs a column `answer` or `solution`", "columns found: gold"]),
        ("mine", ["'mine' needs 'topic'", "columns found: gold"]),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["train", "dry-run"])
def test_a_missing_reward_column_is_found_before_loading(
    monkeypatch, capsys, job, tmp_path, no_loading, reward, words, dry
):
    data = tmp_path / "gold.jsonl"
    data.write_text('{"prompt": "a b", "gold": "1"}\n', encoding="utf-8")
    mine = tmp_path / "mine.py"
    mine.write_text("async def mine(completions, topic, **kwargs):\n    return [0.0] * len(topic)\n", encoding="utf-8")
    reward = f"{mine}:mine" if reward == "mine" else reward
    text = sentence(train(monkeypatch, capsys, job, *dry, data=str(data), reward=reward))
    for word in words:
        assert word in text, text
    assert not (tmp_path / "run").exists()


def test_a_reward_column_that_only_the_evaluation_data_lacks(monkeypatch, capsys, job, tmp_path, no_loading):
    data = tmp_path / "eval.jsonl"
    data.write_text('{"prompt": "a b"}\n', encoding="utf-8")
    text = sentence(train(monkeypatch, capsys, job, eval_data=str(data), reward="content"))
    assert "In the evaluation data" in text and "'answer'" in text


CONSTANT, BROKEN, WRONG = b"hello", b"{% for m in messages %}{{ m.content }", b"{{ messages[0].content + 1 }}"


@pytest.mark.parametrize(
    "content,words",
    [
        (b"\x89PNG\r\n\x1a\n\x00\x00", ["template.jinja is not UTF-8 text", "byte 0x89 in line 1"]),
        (b'{"chat_template": "{{ messages }}"}', ["JSON file", "`chat_template` entry"]),
        (CONSTANT, ["renders every conversation as the same text", "--chat-template plain"]),
        (BROKEN, ["no Jinja template (line 1", "--chat-template"]),
        (WRONG, ["refuses a conversation of system, user", "another --chat-template"]),
    ],
    ids=["png", "json", "constant", "broken", "type error"],
)
def test_a_file_that_is_no_chat_template(monkeypatch, capsys, job, tmp_path, no_loading, content, words):
    file = tmp_path / "template.jinja"
    file.write_bytes(content)
    text = sentence(train(monkeypatch, capsys, job, chat_template=str(file), system_prompt="be brief"))
    for word in words:
        assert word in text, text
    assert not (tmp_path / "run").exists()


def test_a_later_conversation_that_the_chat_template_refuses(monkeypatch, capsys, job, tmp_path, no_loading):
    data, file = tmp_path / "chats.jsonl", tmp_path / "template.jinja"
    rows = [[{"role": "user", "content": "a"}], [{"role": "tool", "content": "b"}, {"role": "user", "content": "c"}]]
    data.write_text("\n".join(json.dumps({"prompt": row}) for row in rows), encoding="utf-8")
    file.write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}"
        "{% endfor %}",
        encoding="utf-8",
    )
    text = sentence(train(monkeypatch, capsys, job, data=str(data), chat_template=str(file)))
    assert "refuses a conversation of tool, user (no tools)" in text


def test_empty_data(monkeypatch, capsys, job, tmp_path):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    assert "empty" in sentence(train(monkeypatch, capsys, job, data=str(tmp_path / "empty.jsonl")))


def test_no_reward_and_nothing_to_guess_from(monkeypatch, capsys, job, tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a b"}\n', encoding="utf-8")
    text = sentence(train(monkeypatch, capsys, job, data=str(tmp_path / "bare.jsonl"), reward=None))
    assert "--reward" in text and "--template" in text


@pytest.mark.parametrize("column,template", [("completion", "tldr"), ("solution", "r1")])
def test_the_columns_tell_the_template(monkeypatch, capsys, job, tmp_path, column, template):
    data = tmp_path / "shaped.jsonl"
    data.write_text(json.dumps({"prompt": "a b", column: "1"}) + "\n", encoding="utf-8")
    plain = {"data": str(data), "reward": None, "chat_template": "plain", "cold_start": "off"}
    code, out, err = train(monkeypatch, capsys, job, **plain)
    assert code == 0 and f"template {template}" in out, err
    assert f'template = "{template}"' in (tmp_path / "run" / "recipe.toml").read_text(encoding="utf-8")


def test_unknown_key_in_a_recipe_file(monkeypatch, capsys, job, tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-6\nnum_generation: 4\n", encoding="utf-8")
    text = sentence(train(monkeypatch, capsys, job, config=str(tmp_path / "r.yaml")))
    assert "num_generation" in text and "num_generations" in text and "r.yaml" in text


def test_a_cpu_only_torch_beside_an_nvidia_card(monkeypatch, capsys, job):
    import torch

    from lowvram_grpo.memory import devices

    monkeypatch.setattr(devices, "_nvidia_card", lambda: "NVIDIA GeForce RTX 3070")
    monkeypatch.setattr(torch.version, "cuda", None)
    text = sentence(train(monkeypatch, capsys, job, use_cpu=None))
    assert "RTX 3070" in text and "pip install" in text and "--use-cpu" in text


def test_an_existing_run_is_not_overwritten(monkeypatch, capsys, job):
    assert train(monkeypatch, capsys, job)[0] == 0
    assert "--resume" in sentence(train(monkeypatch, capsys, job))


def test_a_mistake_in_the_middle_keeps_the_steps_that_were_done(monkeypatch, capsys, job, tmp_path):
    reward = job["--reward"].replace("digits", "later")
    text = sentence(train(monkeypatch, capsys, job, reward=reward, max_steps="5"))
    assert "2 steps are kept" in text and f"--resume {tmp_path / 'run'}" in text
    mended = (tmp_path / "rewards.py").read_text(encoding="utf-8").replace("len(calls) < 3", "True")
    (tmp_path / "rewards.py").write_text(mended, encoding="utf-8")
    code, out, _ = train(monkeypatch, capsys, {}, resume=str(tmp_path / "run"))
    assert code == 0 and "resuming from step 2" in out and "step 5/5" in out
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5]


def test_a_base_model_with_the_plain_chat_template(monkeypatch, capsys, job):
    code, _, err = train(monkeypatch, capsys, job, system_prompt="be brief", chat_template="plain", reward="label")
    assert code == 0, err


def test_a_fresh_adapter_directory_can_be_started_from(monkeypatch, capsys, job, tmp_path):
    assert train(monkeypatch, capsys, job, max_steps="2", learning_rate="0.01")[0] == 0
    again = {**job, "--output-dir": str(tmp_path / "second"), "--adapter": str(tmp_path / "run" / "adapter")}
    assert train(monkeypatch, capsys, again)[0] == 0
    row = json.loads((tmp_path / "second" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["kl"] == 0


def test_lora_settings_are_those_of_the_adapter(monkeypatch, capsys, job, tmp_path):
    assert train(monkeypatch, capsys, job, lora_r="4", lora_target_modules="q_proj,v_proj")[0] == 0
    again = {**job, "--output-dir": str(tmp_path / "second"), "--adapter": str(tmp_path / "run" / "adapter")}
    text = sentence(train(monkeypatch, capsys, again, lora_r="8"))
    assert "lora_r is 8" in text and "has 4" in text and not (tmp_path / "second").exists()
    code, _, err = train(monkeypatch, capsys, again, lora_r="4")
    written = (tmp_path / "second" / "recipe.toml").read_text(encoding="utf-8")
    assert code == 0 and "lora_r = 4" in written and '"q_proj",' in written, err
    code, out, err = train(monkeypatch, capsys, {}, resume=str(tmp_path / "second"), max_steps="2")
    assert code == 0 and "resuming from step 1" in out, err
    third = {"config": str(tmp_path / "second" / "recipe.toml"), "output_dir": str(tmp_path / "third")}
    assert train(monkeypatch, capsys, {}, **third)[0] == 0


@pytest.mark.parametrize(
    "extra,evaluated", [({}, [2, 3]), ({"eval_strategy": "no"}, []), ({"eval_steps": "1"}, [1, 2, 3])]
)
def test_evaluation_data_is_evaluated_on(monkeypatch, capsys, job, tmp_path, extra, evaluated):
    code, out, err = train(
        monkeypatch,
        capsys,
        job,
        eval_data=job["--data"],
        eval_split="train[:2]",
        max_steps="3",
        save_steps="2",
        **extra,
    )
    assert code == 0 and ("evaluating on 2 prompts" in out) == ("eval_strategy" not in extra), err
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert [row["step"] for row in rows if "eval_reward" in row] == evaluated


def test_a_cold_start_through_the_command_line(monkeypatch, capsys, job, tmp_path):
    """Both kinds of console see every row that a cold start logs."""
    cold = {
        "template": "tldr",
        "chat_template": "plain",
        "reward": None,
        "cold_start": "2",
        "max_completion_length": "12",
    }
    code, out, err = train(monkeypatch, capsys, job, **cold)
    assert code == 0, err
    assert (
        "cold start 0  reward 0.00" in out and "cold start 2  loss" in out and "cold start ended after 2 steps" in out
    )
    assert (tmp_path / "run" / "cold_start" / "adapter_model.safetensors").is_file()


def test_memory_that_runs_out_for_good_keeps_the_steps_that_were_done(monkeypatch, capsys, job, tmp_path):
    import torch

    from lowvram_grpo.rollout.engine import RolloutEngine
    from lowvram_grpo.training.savers import TrainerGuard

    inner, calls = RolloutEngine.generate, []

    def full(self, *args, **kwargs):
        calls.append(self.rows)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(RolloutEngine, "generate", full)
    init = TrainerGuard.__init__
    monkeypatch.setattr(
        TrainerGuard, "__init__", lambda self, *a, **k: (init(self, *a, **k), setattr(self, "active", True))[0]
    )
    text = sentence(train(monkeypatch, capsys, job, max_steps="5"))
    assert "rollout phase" in text and "no memory saver is left" in text and f"--resume {tmp_path / 'run'}" in text
    assert len(set(calls)) > 2  # smaller and smaller waves
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"memory/oom_phase": "rollout"' in rows and "rollout_batch_size=1" in rows
    assert any(path.name.startswith("checkpoint-") for path in (tmp_path / "run").rglob("checkpoint-*"))
