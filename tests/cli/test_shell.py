"""The commands themselves, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": os.pathsep.join(sys.path)}


def call(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "lowvram_grpo.cli.app", *map(str, arguments)],
        capture_output=True, text=True, encoding="utf-8", env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def test_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lowvram_grpo.cli.app", "--help"],
        capture_output=True, text=True, encoding="utf-8", env=ENVIRONMENT, timeout=60, check=True,
    )  # fmt: skip
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "peft", "bitsandbytes", "sympy", "numpy"}
    for command in ("train", "demo", "doctor", "presets", "report"):
        assert command in done.stdout


def test_version_doctor_and_presets():
    assert call("--version").stdout.startswith("lowvram-grpo ")
    assert "ready." in call("doctor").stdout
    assert "8gb" in call("presets").stdout and "nf4" in call("presets", "8gb").stdout
    shown = call("presets", "show", "24gb").stdout
    assert "learning_rate" in shown and "1.  embedding_offload=true" in shown and "quantization=nf4 *" in shown


def test_usage_errors_are_one_sentence():
    mistakes = [
        "demo --steps 0",
        "demo --steps -1",
        "trian",
        "presets 9gb",
        "presets show",
        "presets 8gb cpu",
        "report /no/such/run",
    ]
    for arguments in map(str.split, mistakes):
        done = call(*arguments, code=2)
        assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1


def test_no_command_shows_the_help_and_no_error():
    done = call(code=2)
    assert "train" in done.stdout + done.stderr and "error:" not in done.stderr


def test_demo_starts_and_report_draws_it(tmp_path):
    out = call("demo", "--plain", "--steps", 3, "-o", tmp_path / "run").stdout
    assert "step 3/3" in out and "mean reward" in out
    call("report", tmp_path / "run")
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
