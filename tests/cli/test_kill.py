"""Signals to a real process. kill -9, then --resume: the same steps as a run that nobody killed, or those of changed
settings. Ctrl-C and SIGTERM: a checkpoint of the step in progress."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import make_model, make_tokenizer

from lowvram_grpo import GRPOTrainer
from lowvram_grpo.cli import app

STEPS = 14
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def command(*arguments):
    return [sys.executable, "-m", "lowvram_grpo.cli.app", *map(str, arguments)]


def rows(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row for row in found if "loss" in row}


def steps_logged(run):
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"loss"') if path.is_file() else 0


@pytest.fixture
def job(tmp_path):
    """Arguments of a run whose steps take long enough to be interrupted in."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    # Three rollouts an epoch, so that what the first epoch has measured orders the second, where the run is killed.
    prompts = ["a b", "c d e", "f", "g h", "f i", "k"]
    data.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts), encoding="utf-8")
    reward = tmp_path / "rewards.py"
    # The reward depends on prompt and completion alone; groups of "f ..." are dead, and other prompts take their place.
    reward.write_text(
        "import time\ndef slow(prompts, completions, **kwargs):\n    time.sleep(0.15)\n"
        "    return [p[0] != 'f' and sum(w.isdigit() for w in c.split()) / 8 for p, c in zip(prompts, completions)]\n",
        encoding="utf-8",
    )
    return [
        "train", "--plain", "--use-cpu", "--model", tmp_path / "model", "--data", data, "--reward", f"{reward}:slow",
        "--max-steps", STEPS, "--save-steps", 3, "--num-generations", 4, "--max-completion-length", 6,
        "--learning-rate", "1e-2", "--lr-scheduler-type", "cosine", "--num-iterations", 2,
        "--resample-dead-groups", 2, "--curriculum", "hard_first",
    ]  # fmt: skip


def started(job, run, steps, **kwargs):
    """A process that trains, once it has logged that many steps."""
    process = subprocess.Popen(command(*job, "-o", run), env=ENVIRONMENT, **kwargs)
    deadline = time.time() + 200
    while steps_logged(run) < steps:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    return process


def test_resume_after_kill_9(monkeypatch, capsys, job, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setattr(sys, "argv", ["lowvram-grpo", *map(str, job), "-o", str(whole)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code, capsys.readouterr().err

    process = started(job, killed, 8, stdout=subprocess.DEVNULL)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = rows(killed)
    assert 8 <= len(before) < STEPS

    shutil.copytree(killed, tmp_path / "changed")

    resume = command("train", "--plain", "--resume", killed)
    out = subprocess.run(resume, check=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert "resuming from step" in out.stdout
    expected, resumed = rows(whole), rows(killed)
    assert list(resumed) == list(range(1, STEPS + 1))
    assert sum(row.get("resample/groups_drawn", 0) for row in expected.values()) > 3
    names = "loss", "reward", "kl", "entropy", "grad_norm", "learning_rate", "num_tokens", "resample/tokens_dropped"
    for step, row in expected.items():
        for name in names:
            assert resumed[step].get(name) == row.get(name), (step, name)
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]
    changed_settings(monkeypatch, tmp_path, capsys)


def changed_settings(monkeypatch, tmp_path, capsys):
    """The killed run once more, with all at once that can change; and refused with what can't."""
    run = tmp_path / "changed"
    step = int(max(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:])).name[11:])
    before, completions = rows(run), (run / "completions.jsonl").read_bytes()
    refused = ["lowvram-grpo", "train", "--plain", "--resume", str(run), "--optim", "adamw_bnb_8bit"]
    monkeypatch.setattr(sys, "argv", refused)
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 2 and "--optim can't change" in capsys.readouterr().err
    assert rows(run) == before and (run / "completions.jsonl").read_bytes() == completions

    used = {}
    original = GRPOTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        group = self.optimizer.param_groups[0]
        used[self.state.global_step + 1] = (group["lr"], group["betas"], len(inputs), self.state.max_steps)
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", watched)
    flags = {"learning_rate": 1e-4, "adam_beta1": 0.5, "max_steps": STEPS + 2, "prompts_per_step": 3}
    changed = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", [*refused[:-2], *changed])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code, capsys.readouterr().err
    after = rows(run)
    assert list(after) == list(range(1, STEPS + 3)) and list(used) == list(range(step + 1, STEPS + 3))
    for number, (rate, betas, prompts, horizon) in used.items():
        assert rate == pytest.approx(1e-4 * 0.5 * (1 + math.cos(math.pi * (number - 1) / (STEPS + 2))))
        assert (betas, prompts, horizon) == ((0.5, 0.999), 3, STEPS + 2)
        assert after[number]["learning_rate"] == rate
    assert {number: after[number] for number in range(1, step + 1)} == {n: before[n] for n in range(1, step + 1)}
    recipe = [line.partition("  #")[0] for line in (run / "recipe.toml").read_text(encoding="utf-8").splitlines()]
    assert {f"{name} = {value}" for name, value in flags.items()} <= set(recipe)


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)]
)
def test_a_signal_ends_the_step_and_saves(job, tmp_path, signum, code):
    run = tmp_path / "run"
    process = started(job, run, 4, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    last = max(rows(run))
    assert 4 <= last < STEPS and (run / f"checkpoint-{last}" / "trainer_state.json").is_file()
    assert f"stopped at step {last}; go on with --resume {run}" in out
