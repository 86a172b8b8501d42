"""push_to_hub: what goes out and what never does, when, and what becomes of a hub that fails."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import Quiet, digit_share, make_model
from peft import LoraConfig
from transformers import TrainerCallback

from lowvram_grpo import GRPOTrainer, UserError
from lowvram_grpo.training.pushing import STAGED

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}


class Hub:
    """huggingface_hub.HfApi, as far as it is asked; keeps what it gets, after so many uploads that fail."""

    endpoint = "http://hub"

    def __init__(self):
        self.made, self.commits, self.failures, self.tokens = [], [], 0, []
        self.gate = threading.Event()
        self.gate.set()
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, token=None):
        self.tokens.append(token)
        return self

    def create_repo(self, name, **kwargs):
        self.made.append((name, kwargs))
        return SimpleNamespace(repo_id=f"me/{name}")

    def create_branch(self, repo, *, branch, exist_ok):
        self.made.append((repo, branch))

    def run_as_future(self, call, **kwargs):
        return self._thread.submit(call, **kwargs)

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message, revision):
        assert self.gate.wait(60)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to host")
        files = {path.relative_to(folder_path).as_posix(): path.read_bytes()
                 for path in Path(folder_path).rglob("*") if path.is_file()}  # fmt: skip
        self.commits.append(
            SimpleNamespace(repo=repo_id, place=path_in_repo, message=commit_message, revision=revision, files=files)
        )
        return "a commit"


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", found)
    monkeypatch.setattr("lowvram_grpo.training.early_checks.check_hub", lambda args: None)
    return found


@pytest.fixture
def trainer_with(config, dataset, tokenizer, hub):
    def made(peft_config=LORA, **settings):
        args = config(**{"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "log_completions": True,
                         "hub_token": "hf_secret", "hub_always_push": True, **settings})  # fmt: skip
        return GRPOTrainer(
            make_model(), digit_share, args, dataset, processing_class=tokenizer, peft_config=peft_config,
            observer=Quiet(),
        )  # fmt: skip

    return made


def said(trainer):
    return [text for text in trainer.observer.said if "hub" in text]


def test_model_tokenizer_and_card_go_out_and_nothing_that_was_sampled(trainer_with, hub, tmp_path):
    trainer = trainer_with(hub_model_id="policy", hub_private_repo=True, num_iterations=2, max_steps=3)
    trainer.train()
    assert hub.made == [("policy", {"private": True, "exist_ok": True})] and hub.tokens == ["hf_secret"]
    assert [(each.repo, each.place, each.message) for each in hub.commits] == [
        ("me/policy", None, f"Training in progress, step {step}") for step in (1, 2, 3)
    ]
    for step, commit in enumerate(hub.commits, 1):
        assert commit.files.keys() == ADAPTER
        saved = tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors"
        assert commit.files["adapter_model.safetensors"] == saved.read_bytes()
        assert b"policy" in commit.files["README.md"]
    assert (tmp_path / "run" / "completions.jsonl").exists()  # which transformers would upload
    assert not (tmp_path / "run" / STAGED).exists() and not said(trainer)
    assert trainer.push_to_hub("The end") == "a commit"
    assert hub.commits[-1].message == "The end" and hub.commits[-1].files.keys() == ADAPTER
    trainer.save_model()
    assert len(hub.commits) == 5


@pytest.mark.parametrize("strategy, places", [("checkpoint", ["last-checkpoint"] * 2),
                                              ("all_checkpoints", ["checkpoint-1", "checkpoint-2"])])  # fmt: skip
def test_a_checkpoint_goes_out_without_completions_and_secrets(
    trainer_with, hub, strategy, places, tmp_path, config, dataset, tokenizer
):
    # In the middle of a rollout, whose rest a checkpoint keeps here.
    trainer_with(hub_strategy=strategy, num_iterations=4, hub_revision="trial").train()
    assert (tmp_path / "run" / "checkpoint-1" / "rollout.pt").exists()
    assert {each.revision for each in hub.commits} == {"trial"} and hub.made[-1] == ("me/run", "trial")
    pushed = [commit for commit in hub.commits if commit.place]
    assert [commit.place for commit in pushed] == places
    for commit in pushed:
        assert {"optimizer.pt", "trainer_state.json", "adapter_model.safetensors"} <= commit.files.keys()
        assert not {"rollout.pt", "training_args.bin"} & commit.files.keys()
    assert not any(b"hf_secret" in data for commit in hub.commits for data in commit.files.values())
    # Another machine goes on from it.
    there = tmp_path / "there" / "checkpoint-1"
    for name, data in pushed[0].files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(data)
    again = trainer_with(output_dir=str(there.parent), num_iterations=4, push_to_hub=False)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_all_weights_and_an_adapter_of_another_name(trainer_with, hub, config, dataset, tokenizer):
    from peft import get_peft_model

    trainer_with(peft_config=None, max_steps=1).train()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= hub.commits[-1].files.keys()
    named = get_peft_model(make_model(), LORA, adapter_name="mine")
    args = config(save_strategy="steps", save_steps=1, push_to_hub=True, max_steps=1)
    GRPOTrainer(named, digit_share, args, dataset, processing_class=tokenizer, observer=Quiet()).train()
    assert hub.commits[-1].files.keys() == ADAPTER


def test_nothing_goes_out_before_the_end_where_it_is_to_be_the_end(trainer_with, hub):
    trainer = trainer_with(hub_strategy="end")
    trainer.train()
    assert not hub.commits
    trainer.push_to_hub()
    assert len(hub.commits) == 1


def test_one_at_a_time_unless_each_is_wanted(trainer_with, hub):
    class Opens(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            hub.gate.set()

    for always, steps in ((False, ["1"]), (True, ["1", "2", "3"])):
        hub.gate.clear()
        hub.commits.clear()
        trainer = trainer_with(hub_always_push=always, max_steps=3)
        trainer.add_callback(Opens())
        trainer.train()
        assert [commit.message[-1] for commit in hub.commits] == steps


def test_what_fails_is_said_and_loses_nothing(trainer_with, hub, tmp_path):
    hub.failures = 1
    trainer = trainer_with(max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "run" / "checkpoint-3").exists()
    (text,) = said(trainer)
    assert "nothing was pushed to the hub" in text and "no route to host" in text
    assert [commit.message[-1] for commit in hub.commits] == ["2", "3"]
    hub.failures = 2
    assert trainer.push_to_hub() is None and len(said(trainer)) == 2
    trainer.push_folder(tmp_path / "run" / "checkpoint-3", "by hand")
    assert "`hf upload me/run" in said(trainer)[-1] and len(said(trainer)) == 3
    assert not (tmp_path / "run" / STAGED).exists()


def test_a_repository_that_cannot_be_made_is_known_before_training(trainer_with, hub, monkeypatch):
    monkeypatch.setattr(hub, "create_repo", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UserError, match=r"can't make the repository .*hub_model_id"):
        trainer_with()
