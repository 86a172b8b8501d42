"""report_to: what trackers get, when they begin, where they go on, and what becomes of one that fails; the trackers are
recorders, transformers' callbacks are the real ones."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.run import jsonl
from lowvram_grpo.training.completions_tables import joined, markdown, table_of, unique_prompts
from tests.training import fake_trackers

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] in (*fake_trackers.NAMES, "tensorboard")]:
        del sys.modules[name]


@pytest.fixture
def trackers(tmp_path, monkeypatch):
    """Imports one of the recorders."""
    fake_trackers.install(tmp_path / "site")
    forget()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # where there is one: the recorder is wanted
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_MODE", "WANDB_LOG_MODEL", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield importlib.import_module
    forget()


@pytest.fixture
def trainer_with(config, dataset, tokenizer):
    def made(reward=digit_share, evaluated=None, **settings):
        args = config(**settings)
        return GRPOTrainer(
            make_model(), reward, args, dataset, evaluated, tokenizer, peft_config=LORA, observer=Quiet()
        )

    return made


def logged(module):
    return [row for kind, *row in module.calls if kind == "log" for row in row]


def test_a_plain_run_imports_no_tracker(trackers, trainer_with):
    trainer = trainer_with(log_completions=True)
    trainer.train()
    assert not fake_trackers.NAMES & set(sys.modules) and trainer.tables is None


def test_tables_have_what_completions_jsonl_has(trackers, trainer_with, dataset, tmp_path):
    def reward(completions, log_extra, **kwargs):
        log_extra("note", [{"of": i} for i in range(len(completions))])
        return [None if i == 0 else value for i, value in enumerate(digit_share(completions))]

    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 1, "per_device_eval_batch_size": 2}
    trainer = trainer_with(
        reward,
        dataset.select(range(3)),
        report_to=["wandb", "trackio"],
        log_completions=True,
        max_steps=2,
        **evaluation,
    )
    trainer.train()
    wandb, trackio = trackers("wandb"), trackers("trackio")
    tables = {"wandb": [], "trackio": []}
    for row in logged(wandb):
        for key in ("completions", "eval/completions"):
            if key in row:
                tables["wandb"].append((key, row["train/global_step"], row[key].columns, row[key].data))
    for row in logged(trackio):
        for key in ("completions", "eval/completions"):
            if key in row:
                frame = row[key].dataframe.astype(object).where(row[key].dataframe.notna(), None)
                tables["trackio"].append((key, row["train/global_step"], list(frame), frame.values.tolist()))
    assert tables["wandb"] == tables["trackio"]
    first, second, evaluated = tables["wandb"]
    assert [table[:2] for table in tables["wandb"]] == [("completions", 1), ("completions", 2), ("eval/completions", 2)]
    assert first[2] == ["step", "prompt", "completion", "reward", "note", "advantage"]
    written = jsonl.read(tmp_path / "run" / "completions.jsonl")
    assert [
        [row["step"], row["prompt"], row["completion"], row["rewards"]["reward"], json.dumps(row["extras"]["note"]),
         row["advantage"]] for row in written
    ] == first[3] + second[3]  # fmt: skip
    assert first[3][0][3] is None and len(evaluated[3]) == 3  # two batches
    # Metrics go out beside them, by the names that transformers makes of TRL's.
    names = {name for row in logged(wandb) for name in row}
    assert {"train/rewards/reward/mean", "eval/reward", "eval/completions/mean_length"} <= names
    values = [value for row in logged(wandb) for name, value in row.items() if "completions" not in name]
    assert all(isinstance(value, (int, float)) for value in values)


def test_each_prompt_once(trackers, trainer_with):
    trainer_with(report_to="wandb", log_completions=True, log_unique_prompts=True, max_steps=1).train()
    (table,) = [row["completions"] for row in logged(trackers("wandb")) if "completions" in row]
    assert len(table.data) == 2 == len({row[1] for row in table.data})


def test_tables_are_off_unless_asked(trackers, trainer_with):
    trainer_with(report_to="wandb", max_steps=1).train()
    assert not any("completions" in row for row in logged(trackers("wandb")))


def test_tensorboard_gets_a_few_rows_and_stays_in_the_run(trackers, trainer_with, tmp_path):
    settings = {"report_to": "tensorboard", "log_completions": True, "save_strategy": "steps", "save_steps": 1}
    data_to_warm_up = {"cold_start": "off"}
    trainer_with(num_completions_to_print=3, **settings, **data_to_warm_up).train()
    board = trackers("tensorboardX")
    (_, place, purge), *_ = board.calls
    assert Path(place).parent == tmp_path / "run" / "runs" and purge is None
    texts = [call for call in board.calls if call[:2] == ("text", "completions")]
    assert [call[3] for call in texts] == [1, 2] and all(call[2].count("\n") == 1 + 3 for call in texts)
    # After a resume in the same place, where what came behind the checkpoint is taken back.
    board.calls.clear()
    trainer_with(max_steps=3, **settings).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert board.calls[0] == ("open", place, 2)


def test_a_row_before_step_1_finds_the_run(trackers, config, tokenizer, tmp_path):
    """transformers' TensorBoard writes what comes before training into the working directory, and all that follows."""
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": ["a b", "c d", "e f", "g h"] * 3, "reference_completion": ["1 2 3"] * 12})
    args = config(report_to="tensorboard", cold_start=1, max_steps=1)
    GRPOTrainer(make_model(), digit_share, args, data, None, tokenizer, peft_config=LORA, observer=Quiet()).train()
    opened = [call for call in trackers("tensorboardX").calls if call[0] == "open"]
    assert len(opened) == 1 and Path(opened[0][1]).is_relative_to(tmp_path / "run")
    assert not (tmp_path / "runs").exists()


def test_wandb_goes_on_with_the_run_it_had(trackers, trainer_with, tmp_path, monkeypatch):
    settings = {"report_to": "wandb", "save_strategy": "steps", "save_steps": 1}
    trainer_with(max_steps=1, **settings).train()
    wandb = trackers("wandb")
    (began,) = [made for kind, made in wandb.calls if kind == "init"]
    assert began["resume"] is None
    wandb.run = None  # another process
    trainer_with(max_steps=2, **settings).train(resume_from_checkpoint=True)
    assert [made for kind, made in wandb.calls if kind == "init"][-1] == {**began, "resume": "allow"}
    # The environment has the last word; and a new run of this process is a new one.
    wandb.run = None
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    trainer_with(max_steps=3, **settings).train(resume_from_checkpoint=True)
    assert wandb.run.id == "mine"


def test_one_that_cannot_begin_is_known_before_anything_is_sampled(trackers, trainer_with, monkeypatch):
    monkeypatch.setattr(trackers("wandb"), "refuses", "no API key")
    trainer = trainer_with(report_to="wandb")
    monkeypatch.setattr(trainer, "collect", lambda *args: pytest.fail("sampled"))
    with pytest.raises(UserError, match=r"report_to wandb can't begin \(.*no API key.*WANDB_MODE=offline"):
        trainer.train()


def test_one_that_fails_later_ends_no_run(trackers, trainer_with, monkeypatch):
    trainer = trainer_with(report_to=["wandb", "trackio"], log_completions=True, max_steps=3)
    wandb = trackers("wandb")
    monkeypatch.setattr(trainer.observer, "sample", lambda *args: monkeypatch.setattr(wandb, "refuses", "disk full"))
    trainer.train()
    assert trainer.state.global_step == 3
    told = [text for text in trainer.observer.said if "disk full" in text]
    assert len(told) == 2 and "report_to wandb failed" in told[0] and "table of completions" in told[1]
    assert len([row for row in logged(trackers("trackio")) if "completions" in row]) == 3


@pytest.mark.parametrize("tables, space", [(True, False), (False, None)])
def test_a_push_takes_no_tables_along(trackers, trainer_with, monkeypatch, tables, space):
    """With a push transformers copies a local trackio project to the hub."""
    monkeypatch.setattr(GRPOTrainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr("lowvram_grpo.training.early_checks.check_hub", lambda args: None)
    trainer = trainer_with(report_to="trackio", push_to_hub=True, log_completions=tables)
    assert trainer.args.trackio_static_space_id is space
    assert any("trackio's project stays on this machine" in text for text in trainer.observer.said) == tables


def test_rows_are_text_and_numbers():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}]
    table = table_of([turns, "q"], [call, "c"], {"r": [1.0, None]}, [0.5, -0.5], {"note": [{"a": 1}, 2]})
    assert table["prompt"] == ["system: s\nuser: u", "q"] and table["completion"][0] == "-> add({})"
    assert table["note"] == ['{"a": 1}', 2] and list(table) == ["prompt", "completion", "r", "note", "advantage"]
    more = joined(table, table_of(["q"], ["d"], {"r": [0.0]}, [0.0]))
    assert more["note"] == ['{"a": 1}', 2, None]
    assert unique_prompts(more)["completion"] == [table["completion"][0], "c"]
    text = markdown({"completion": ["a|b\n<script> [x](http://y) `c`", "d" * 3000], "r": [1 / 3, None]}, rows=1)
    assert text.splitlines()[-1] == "| a&#124;b<br>&lt;script&gt; &#91;x&#93;(http://y) &#96;c&#96; | 0.3333 |"


def test_settings_of_tables_that_do_nothing_are_said(config):
    said = lambda **settings: " ".join(config(**settings).notices())
    assert "num_completions_to_print has no effect without log_completions" in said(num_completions_to_print=2)
    assert "log_unique_prompts has no effect" in said(log_unique_prompts=True, log_completions=True)
    assert "no effect" not in said(num_completions_to_print=2, log_completions=True)
    with pytest.raises(UserError, match="num_completions_to_print is 0"):
        config(num_completions_to_print=0)


def test_completions_that_are_shown_go_from_worst_to_best(config, dataset, tokenizer, trainer_with, monkeypatch):
    trainer = trainer_with(log_completions=True, num_completions_to_print=3, max_steps=1, prompts_per_step=1)
    shown = []
    monkeypatch.setattr(trainer.observer, "sample", lambda prompt, completion, reward, step: shown.append(reward))
    trainer.train()
    rewards = sorted(
        row["rewards"]["digit_share"] for row in jsonl.read(Path(trainer.args.output_dir) / "completions.jsonl")
    )
    assert len(shown) == 3 and shown == sorted(shown) and (shown[0], shown[-1]) == (rewards[0], rewards[-1])
