"""A GRPO script as people write it for TRL runs with only its import changed."""

from __future__ import annotations

import json
import re
import runpy

from conftest import CHAT_TEMPLATE, make_model, make_tokenizer

SCRIPT = """
import re
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

SYSTEM = "answer must stand inside tags"

def to_chat(row):
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "a b c"},
            {"role": "assistant", "content": "1 2"},
            {"role": "user", "content": row["prompt"]},
        ],
        "answer": row["completion"],
    }

def has_digit(completions, **kwargs):
    return [5.0 if re.search(r"[0-9]", c[0]["content"]) else 0.0 for c in completions]

def only_digits(prompts, completions, **kwargs):
    return [10.0 if re.fullmatch(r"[0-9 ]+", c[0]["content"]) else 0.0 for c in completions]

def shorter(completions, answer, **kwargs):
    return [5.0 if len(c[0]["content"]) < len(a) else 0.0 for c, a in zip(completions, answer)]

data = load_dataset("json", data_files=DATA, split="train").map(to_chat, remove_columns=["completion"])
args = GRPOConfig(
    output_dir=OUT,
    learning_rate=1e-3,
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.1,
    warmup_ratio=0.1,
    lr_scheduler_type="cosine",
    logging_steps=1,
    bf16=False,
    fp16=False,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=4,
    num_generations=4,
    max_prompt_length=64,
    max_completion_length=8,
    num_train_epochs=1,
    max_steps=3,
    save_steps=2,
    max_grad_norm=0.1,
    log_on_each_node=False,
    use_vllm=False,
    vllm_gpu_memory_utilization=0.3,
    report_to="none",
    temperature=0.9,
    beta=0.04,
    epsilon=0.2,
    num_iterations=1,
    scale_rewards=True,
    loss_type="grpo",
    log_completions=True,
    remove_unused_columns=False,
    use_cpu=True,
)
trainer = GRPOTrainer(model=MODEL, reward_funcs=[has_digit, only_digits, shorter], args=args, train_dataset=data)
trainer.train()
trainer.model.save_pretrained(OUT + "/final")
"""


def test_runs_with_only_its_import_changed(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    rows = [{"prompt": "d e f", "completion": "4 5 6 7"}, {"prompt": "x y", "completion": "1"}] * 8
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("from trl import", "from lowvram_grpo import"), encoding="utf-8")
    places = {"MODEL": str(tmp_path / "model"), "DATA": str(tmp_path / "data.jsonl"), "OUT": str(tmp_path / "out")}
    end = runpy.run_path(str(script), init_globals=places)
    log = [row for row in end["trainer"].state.log_history if "loss" in row]
    assert [row["step"] for row in log] == [1, 2, 3]
    assert {"rewards/has_digit/mean", "rewards/only_digits/mean", "rewards/shorter/mean"} <= log[0].keys()
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()
    rows = (tmp_path / "out" / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3 * 4 and json.loads(rows[0])["step"] == 1
    assert len(re.findall("from trl", SCRIPT)) == 1
