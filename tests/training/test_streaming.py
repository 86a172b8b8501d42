"""GRPOTrainer on streams, and what it says of rows from several sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Quiet, digit_share, make_model, make_tokenizer
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig

from lowvram_grpo.errors import UserError
from lowvram_grpo.training.trainer import GRPOTrainer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
WORDS = ["a b", "c d", "e f", "g h", "a c", "b d", "e g", "f h", "a d", "b c"]


class Heard(Quiet):
    def __init__(self):
        super().__init__()
        self.said = []

    def notice(self, text):
        self.said.append(text)


def stream(rows=10):
    return Dataset.from_dict({"prompt": WORDS[:rows]}).to_iterable_dataset(num_shards=2)


def run(config, tokenizer, data, *, resume=None, reward=digit_share, evaluated=None, **settings):
    args = config(**{"save_strategy": "steps", "save_steps": 1, "max_steps": 7, **settings})
    trainer = GRPOTrainer(
        make_model(), reward, args, data, evaluated, processing_class=tokenizer, peft_config=LORA, observer=Heard()
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rows(trainer):
    names = ("loss", "reward", "kl", "entropy", "grad_norm", "num_tokens", "epoch")
    return {r["step"]: [r.get(name) for name in names] for r in trainer.state.log_history if "loss" in r}


@pytest.mark.parametrize("cut", [3, 4])
def test_a_resumed_stream_takes_the_same_steps(config, tokenizer, tmp_path, cut):
    settings = {"num_iterations": 2, "prompts_per_step": 3}
    whole = run(config, tokenizer, stream(), output_dir=str(tmp_path / "a"), **settings)
    checkpoint = str(tmp_path / "a" / f"checkpoint-{cut}")
    torch.manual_seed(12345)
    rest = run(config, tokenizer, stream(), output_dir=str(tmp_path / "b"), resume=checkpoint, **settings)
    assert rows(rest).keys() == {*range(1, 8)}
    assert all(rows(rest)[step] == rows(whole)[step] for step in range(cut + 1, 8))
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, rest.model.get_parameter(name)), name


def test_a_resumed_stream_with_larger_steps_leaves_no_prompt_out(config, tokenizer, tmp_path):
    seen = []

    def watched(prompts, completions, **columns):
        seen.append([*dict.fromkeys(prompts)])
        return digit_share(completions)

    settings = {"self_test": False, "signal_check": False, "shuffle_dataset": False, "reward": watched}
    run(config, tokenizer, stream(), output_dir=str(tmp_path / "a"), max_steps=2, prompts_per_step=2, **settings)
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    run(config, tokenizer, stream(), output_dir=str(tmp_path / "b"), resume=checkpoint, max_steps=4, prompts_per_step=3,
        **settings)  # fmt: skip
    assert seen == [WORDS[:2], WORDS[2:4], WORDS[4:7], WORDS[7:]]


def test_epochs_are_passes_and_a_stream_begins_anew(config, tokenizer):
    trainer = run(config, tokenizer, stream(4), prompts_per_step=2, max_steps=5)
    assert [row["epoch"] for row in trainer.state.log_history if "loss" in row] == [0.0, 1.0, 1.5, 2.0, 2.5]
    assert "the data has come to its end: pass 3 over it begins." in trainer.observer.said


def test_a_stream_that_can_be_read_once_ends_the_run(config, tokenizer):
    class Once(torch.utils.data.IterableDataset):
        begun = 0

        def __iter__(self):
            self.begun += 1  # a look before, the probe's first batch, the run; then nothing more
            return iter([{"prompt": word} for word in WORDS[:4]] if self.begun <= 2 else [])

    trainer = run(config, tokenizer, Once(), prompts_per_step=2, self_test=False, signal_check=False)
    assert trainer.state.global_step == 2
    assert any("training ends after 2 steps of 7" in said for said in trainer.observer.said)


def test_a_stream_takes_max_steps(config, tokenizer):
    with pytest.raises(UserError, match=r"is a stream, .*set max_steps \(--max-steps N\)"):
        run(config, tokenizer, stream(), max_steps=-1, num_train_epochs=1)
    with pytest.raises(UserError, match="train_dataset is empty"):
        run(config, tokenizer, stream().take(0))
    with pytest.raises(UserError, match="answer"):
        run(config, tokenizer, stream(), reward=lambda completions, answer: [0.0] * len(completions))


def test_an_evaluation_reads_its_stream_each_time_and_counts_it(config, tokenizer):
    data = DatasetDict(one=Dataset.from_dict({"prompt": WORDS[:3]}), two=Dataset.from_dict({"prompt": WORDS[3:8]}))
    streams = {name: part.to_iterable_dataset() for name, part in data.items()}
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "per_device_eval_batch_size": 8}
    one = run(config, tokenizer, stream(), evaluated=streams, **settings)
    same = run(config, tokenizer, stream(), evaluated=data, **settings)
    for name in ("eval_one_reward", "eval_two_reward"):
        values = [[row[name] for row in each.state.log_history if name in row] for each in (one, same)]
        assert values[0] == values[1] and len(values[0]) == 2
    speeds = [row["eval_two_samples_per_second"] for row in one.state.log_history if "eval_two_reward" in row]
    assert all(speed > 0 for speed in speeds)


def test_rewards_are_logged_by_source(config, tokenizer, tmp_path):
    data = Dataset.from_dict({"prompt": WORDS[:4], "data_source": ["x", "x", "y", "y"]})

    def by_source(completions, data_source, **columns):
        return [1.0 if source == "x" else 0.25 for source in data_source]

    trainer = run(config, tokenizer, data, reward=by_source, prompts_per_step=4, max_steps=1, log_completions=True)
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["data/x/reward"] == 1.0 and row["data/y/reward"] == 0.25
    lines = Path(trainer.args.output_dir, "completions.jsonl").read_text().splitlines()
    assert {json.loads(line)["extras"]["data_source"] for line in lines} == {"x", "y"}


def test_content_in_text_parts_is_text_all_the_way(config, tmp_path):
    reward = lambda completions, **columns: digit_share([turns[0]["content"] for turns in completions])
    part = lambda text: [{"type": "text", "text": text}]
    plain = Dataset.from_dict({"prompt": [[{"role": "user", "content": word * 9}] for word in WORDS[:4]]})
    parts = Dataset.from_dict({"prompt": [[{"role": "user", "content": part(word * 9)}] for word in WORDS[:4]]})
    settings = {"max_steps": 2, "prompts_per_step": 2, "max_prompt_length": 24, "log_completions": True}
    logged = []
    for name, data in (("plain", plain), ("parts", parts)):
        out = tmp_path / name
        run(config, make_tokenizer(chat=True), data, reward=reward, output_dir=str(out), **settings)
        logged.append((out / "completions.jsonl").read_text())
    assert logged[0] == logged[1] and "'type'" not in logged[1]
    image = Dataset.from_dict({"prompt": [[{"role": "user", "content": [{"type": "image", "text": None}]}]]})
    with pytest.raises(UserError, match="a part of type 'image'; only text is supported"):
        run(config, make_tokenizer(chat=True), image)


def test_generators_are_streams(config, tokenizer):
    data = IterableDataset.from_generator(lambda: ({"prompt": word} for word in WORDS))
    assert run(config, tokenizer, data, max_steps=2, prompts_per_step=2).state.global_step == 2
