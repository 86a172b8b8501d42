"""log_completions_hub_repo: what is written, when it is uploaded, and what becomes of a hub that fails."""

from __future__ import annotations

import types
from pathlib import Path

import huggingface_hub
import pytest
from conftest import Quiet, digit_share
from peft import LoraConfig
from pyarrow import parquet

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.training.completions_hub import CompletionsUpload
from lowvram_grpo.training.pushing import check_hub

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


class Hub:
    """Takes what is committed, after so many commits that fail."""

    def __init__(self, failures=0):
        self.failures, self.commits, self.made = failures, [], []

    def create_repo(self, name, **kwargs):
        self.made.append((name, kwargs))
        return types.SimpleNamespace(repo_id=f"me/{name}")

    def create_commit(self, repo, operations, *, repo_type, commit_message):
        assert (repo_type, bool(commit_message)) == ("dataset", True)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to host")
        read = lambda file: file if isinstance(file, bytes) else Path(file).read_bytes()
        self.commits.append((repo, {each.path_in_repo: read(each.path_or_fileobj) for each in operations}))

    @property
    def files(self):
        return {name: data for _, commit in self.commits for name, data in commit.items()}


def upload(tmp_path, hub, said, **kwargs):
    return CompletionsUpload(tmp_path / "completions", "me/x", hub, said.append, card="# card", **kwargs)


def at(step):
    return None, types.SimpleNamespace(global_step=step), None


ROWS = {"prompts": ["p", "q"], "completions": ["c", "d"], "rewards": {"r": [1.0, None]}, "advantages": [0.5, -0.5]}
LOG = {"loss": 0.0}


def test_the_columns_are_trls(tmp_path):
    made = upload(tmp_path, Hub(), [])
    made.write(1, **ROWS)
    made.write(2, **ROWS, extras={"note": ["a", {"b": 1}]})
    made.on_log(*at(2), logs={"eval_loss": 0.0})
    assert not (tmp_path / "completions").exists()  # of an evaluation
    made.on_log(*at(2), logs=LOG)
    table = parquet.read_table(tmp_path / "completions" / "completions_00002.parquet").to_pydict()
    assert list(table) == ["step", "prompt", "completion", "r", "advantage", "note"]
    assert table["step"] == [1, 1, 2, 2] and table["r"] == [1.0, None, 1.0, None]
    assert table["note"] == [None, None, '"a"', '{"b": 1}']
    made.on_log(*at(3), logs=LOG)  # nothing new
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions_00002.parquet"]
    made.on_train_end(*at(3))


def test_conversations_stay_conversations(tmp_path):
    made = upload(tmp_path, Hub(), [])
    turns = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    made.write(1, **{**ROWS, "prompts": turns})
    made.on_train_end(*at(1))
    assert parquet.read_table(tmp_path / "completions" / "completions_00001.parquet")["prompt"].to_pylist() == turns


def test_commits_wait_for_their_time_and_the_rest_goes_at_the_end(tmp_path):
    hub = Hub()
    made = upload(tmp_path, hub, [], every=1000.0)
    for step in (1, 2, 3):
        made.write(step, **ROWS)
        made.on_log(*at(step), logs=LOG)
    made.on_train_end(*at(3))
    first, rest = (set(files) for _, files in hub.commits)
    assert first == {"README.md", "data/completions_00001.parquet"}
    assert rest == {"data/completions_00002.parquet", "data/completions_00003.parquet"}
    assert hub.files["README.md"] == b"# card" and {repo for repo, _ in hub.commits} == {"me/x"}


def test_what_fails_is_said_once_and_tried_again(tmp_path):
    said, hub = [], Hub(failures=2)
    made = upload(tmp_path, hub, said, every=0.0)
    for step in (1, 2, 3):
        made.write(step, **ROWS)
        made.on_log(*at(step), logs=LOG)
        made._settle(wait=True)
    made.on_train_end(*at(3))
    assert len(said) == 1 and "no route to host" in said[0] and "tried again" in said[0]
    assert set(hub.files) == {"README.md", *(f"data/completions_0000{step}.parquet" for step in (1, 2, 3))}


def test_a_hub_that_never_answers_leaves_the_files_and_a_way(tmp_path):
    said = []
    made = upload(tmp_path, Hub(failures=100), said, every=0.0)
    made.write(1, **ROWS)
    made.on_log(*at(1), logs=LOG)
    made.on_train_end(*at(1))
    assert len(said) == 2 and "1 table of completions did not reach me/x" in said[1] and "hf upload" in said[1]
    assert (tmp_path / "completions" / "completions_00001.parquet").exists()


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: found)
    monkeypatch.setattr("lowvram_grpo.training.early_checks.check_hub", lambda args: None)
    return found


def test_a_run_uploads_what_it_samples(config, dataset, tokenizer, model, hub):
    args = config(
        log_completions=True, log_completions_hub_repo="x", hub_private_repo=True, logging_steps=2, max_steps=3
    )
    trainer = GRPOTrainer(
        model, digit_share, args, dataset, processing_class=tokenizer, peft_config=LORA, observer=Quiet()
    )
    assert hub.made == [("x", {"repo_type": "dataset", "private": True, "exist_ok": True})]
    trainer.train()
    tables = {name: parquet.read_table(Path(args.output_dir) / "completions" / name.split("/")[-1]).to_pydict()
              for name in hub.files if name.endswith("parquet")}  # fmt: skip
    assert [table["step"] for _, table in sorted(tables.items())] == [[1] * 8 + [2] * 8, [3] * 8]
    assert all("digit_share" in table for table in tables.values())


def test_a_repository_that_cannot_be_made_ends_it_before_training(config, dataset, tokenizer, hub, monkeypatch):
    monkeypatch.setattr(hub, "create_repo", lambda *args, **kwargs: 1 / 0)
    args = config(log_completions=True, log_completions_hub_repo="x")
    with pytest.raises(UserError, match=r"log_completions_hub_repo 'x' can't be made .*division"):
        GRPOTrainer("no/model", digit_share, args, dataset, processing_class=tokenizer)


def test_the_hub_is_asked_before_training(config, monkeypatch):
    args = config(log_completions=True, log_completions_hub_repo="a/b/c", hub_token="hf_x")
    with pytest.raises(UserError, match="log_completions_hub_repo needs the hub, and HF_HUB_OFFLINE is set"):
        check_hub(args)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    with pytest.raises(UserError, match="log_completions_hub_repo is 'a/b/c', which can't be one"):
        check_hub(args)
