"""`lowvram-grpo train --model Qwen2.5-0.5B --data ./dataset/tldr`, as it stands, with a hub cache and no network."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import make_model, make_tokenizer

from lowvram_grpo.cli import app

LINE = ["train", "--model", "Qwen2.5-0.5B", "--data", "./dataset/tldr"]
SMALL = ["--max-steps", "2", "--num-generations", "4", "--max-completion-length", "4", "--cold-start", "off"]
SAID = "model: Qwen2.5-0.5B is Qwen/Qwen2.5-0.5B on the hub, a base model (Qwen/Qwen2.5-0.5B-Instruct is tuned)."


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a line in a folder that has ./dataset/tldr, beside a hub cache that has the model."""
    from datasets import Dataset
    from huggingface_hub import constants

    place = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B"
    snapshot = place / "snapshots" / ("0123456789" * 4)
    make_model().save_pretrained(snapshot)
    make_tokenizer(chat=True).save_pretrained(snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(snapshot.name, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    posts = {"prompt": ["a b c", "d e"] * 4, "completion": ["1", "2"] * 4}
    Dataset.from_dict(posts).save_to_disk(tmp_path / "work" / "dataset" / "tldr")
    monkeypatch.chdir(tmp_path / "work")

    def call(*line, code=0):
        monkeypatch.setattr(sys, "argv", ["lowvram-grpo", *line])
        with pytest.raises(SystemExit) as stop:
            app.main()
        out = capsys.readouterr()
        assert stop.value.code == code, out.err
        return " ".join((out.out + out.err).split())

    return call


def test_the_line_trains_and_its_run_goes_on(command, tmp_path):
    assert SAID in command(*LINE, *SMALL)
    (run,) = (tmp_path / "work" / "runs").iterdir()
    assert run.name.startswith("Qwen2.5-0.5B-tldr-")
    assert 'model = "Qwen/Qwen2.5-0.5B"' in (run / "recipe.toml").read_text(encoding="utf-8")
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == "Qwen/Qwen2.5-0.5B"
    for named in ([], ["--model", "Qwen2.5-0.5B"]):
        steps = 3 + len(named)
        said = command("train", "--resume", str(run), "--max-steps", str(steps), *named)
        assert "resuming from step" in said and (SAID in said) == bool(named)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]


def test_a_dry_run_names_the_repository(command, tmp_path):
    said = command(*LINE, "--dry-run")
    assert SAID in said and 'model = "Qwen/Qwen2.5-0.5B" # flag' in said and 'template = "tldr"' in said
    assert not (tmp_path / "work" / "runs").exists()


def test_the_other_commands_know_it_too(command):
    assert SAID in command("chat", "--model", "Qwen2.5-0.5B", "--prompt", "a b", "--max-new-tokens", "2")
    assert SAID in command(
        "eval", "--model", "Qwen2.5-0.5B", "--data", "./dataset/tldr", "--samples", "0", "--max-completion-length", "2"
    )
    assert SAID in command("plan", "--model", "Qwen2.5-0.5B", "--preset", "8gb")


def test_a_folder_of_that_name_goes_first(command, tmp_path):
    make_model(num_hidden_layers=1).save_pretrained("Qwen2.5-0.5B")
    make_tokenizer(chat=True).save_pretrained("Qwen2.5-0.5B")
    folder = tmp_path / "work" / "Qwen2.5-0.5B"
    said = command(*LINE, "--dry-run")
    assert f"Qwen2.5-0.5B is the folder {folder}, not Qwen/Qwen2.5-0.5B on the hub" in said
    assert json.dumps(str(folder)) in said


@pytest.mark.parametrize("line", [["train"], ["eval"], ["plan"], ["chat"], ["bench", "memory", "--device", "none"]])
def test_a_name_that_could_mean_several_is_asked_about_everywhere(command, line):
    more = ["--data", "./dataset/tldr"] if line[0] in ("train", "eval") else []
    more += ["--prompt", "a"] if line[0] == "chat" else []
    said = command(*line, "--model", "llama3.2", *more, code=2)
    assert said.split("error: ")[1] == "'llama3.2' could mean Llama-3.2-1B or Llama-3.2-3B; name one of them in full."


def test_only_a_plan_does_without_the_tuning(command):
    asked = "could mean gemma-3-1b-it (tuned) or gemma-3-1b-pt (base); name one of them in full."
    assert asked in command("train", "--model", "gemma-3-1b", "--data", "./dataset/tldr", code=2)
    said = command("plan", "--model", "gemma-3-1b", "--preset", "8gb")
    assert "is planned as Gemma-3-1B; train, chat and eval ask for one of google/gemma-3-1b-it or google" in said


def test_what_is_stored_in_4_bits_is_planned_so(command):
    said = command("plan", "--model", "unsloth/SmolLM2-135M-Instruct-bnb-4bit", "--preset", "24gb")
    assert "the checkpoint is stored in nf4, which is taken as it is." in said and "quantization" not in said
    said = command("plan", "--model", "Qwen/Qwen2.5-0.5B-Instruct-AWQ", "--preset", "8gb", code=2)
    assert "stored in awq" in said and "is stored in a format whose memory is not counted" in said


def test_a_model_of_the_cache_is_found_by_its_name_alone(command, tmp_path):
    folder = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B"
    folder.rename(folder.with_name("models--jingyaogong--MiniMind2"))
    said = command("chat", "--model", "minimind2", "--prompt", "a b", "--max-new-tokens", "2")
    assert "model: minimind2 is jingyaogong/MiniMind2 in this machine's cache of the hub." in said
