"""kill -9 in the middle of a real process, then --resume: the same steps as a run that nobody killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from conftest import make_model, make_tokenizer

STEPS = 14


def command(*arguments):
    return [sys.executable, "-m", "lowvram_grpo.cli.app", *map(str, arguments)]


def rows(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row for row in found if "loss" in row}


def steps_logged(run):
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"loss"') if path.is_file() else 0


def test_resume_after_kill_9(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": p}) for p in ["a b", "c d e", "f", "g h"] * 3), encoding="utf-8")
    reward = tmp_path / "rewards.py"
    # A step takes long enough to be killed in, and the reward depends on nothing but the completion.
    reward.write_text(
        "import time\ndef slow(completions, **kwargs):\n    time.sleep(0.15)\n"
        "    return [sum(w.isdigit() for w in c.split()) / 8 for c in completions]\n",
        encoding="utf-8",
    )
    common = [
        "train", "--plain", "--use-cpu", "--model", tmp_path / "model", "--data", data, "--reward", f"{reward}:slow",
        "--max-steps", STEPS, "--save-steps", 3, "--num-generations", 4, "--max-completion-length", 6,
        "--learning-rate", "1e-2", "--lr-scheduler-type", "cosine", "--num-iterations", 2,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(*common, "-o", whole), check=True, env=environment, capture_output=True, timeout=300)

    process = subprocess.Popen(command(*common, "-o", killed), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.time() + 200
    while steps_logged(killed) < 8:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = rows(killed)
    assert 8 <= len(before) < STEPS

    resume = command("train", "--plain", "--resume", killed)
    out = subprocess.run(resume, check=True, env=environment, capture_output=True, text=True, timeout=300)
    assert "resuming from step" in out.stdout
    expected, resumed = rows(whole), rows(killed)
    assert list(resumed) == list(range(1, STEPS + 1))
    for step, row in expected.items():
        for name in ("loss", "reward", "kl", "entropy", "grad_norm", "learning_rate", "num_tokens"):
            assert resumed[step].get(name) == row.get(name), (step, name)
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]
