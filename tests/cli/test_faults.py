"""Faults that nobody foresaw at their place, injected into loading, training, saving and evaluating: each ends in one
sentence and an exit code, never in a traceback."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys

import pytest
import torch

from lowvram_grpo.cli import app
from lowvram_grpo.faults import explain, suspects
from lowvram_grpo.recipe.resolve import resolve


def run(monkeypatch, capsys, *arguments):
    """(exit code, stderr) of the command line."""
    monkeypatch.setattr(sys, "argv", ["lowvram-grpo", *arguments])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return stop.value.code, capsys.readouterr().err


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


class SafetensorError(Exception):
    """safetensors' own, which carries no errno."""


SafetensorError.__module__ = "safetensors"


def from_the_hub(name, said):
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)
    Exception.__init__(error, said)
    return error


LOAD = "lowvram_grpo.jobs.train.load_model_of"
STEP = "lowvram_grpo.training.trainer.GRPOTrainer.training_step"
SAVE = "peft.PeftModel.save_pretrained"
OPTIMIZER_FILE = "transformers.trainer.Trainer._save_optimizer_and_scheduler"
LOG = "lowvram_grpo.run.jsonl.append"
ADAPTER = "lowvram_grpo.jobs.train.model_card"
EVALUATE = "lowvram_grpo.training.trainer.GRPOTrainer.prediction_step"
FAULTS = [
    (LOAD, MemoryError(), "machine's own memory"),
    (LOAD, RuntimeError("[alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), "machine's own memory"),
    (LOAD, OSError(errno.EIO, "Input/output error", "/models/x.safetensors"), "disk reports an error (/models/x.safe"),
    (LOAD, PermissionError(errno.EACCES, "Permission denied", "/models/x"), "refuses access to /models/x"),
    (LOAD, OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
    (LOAD, ModuleNotFoundError("No module named 'mamba_ssm'", name="mamba_ssm"), "pip install mamba_ssm"),
    (LOAD, ImportError("DLL load failed while importing _C: not found"), "Visual C++ redistributable"),
    (LOAD, from_the_hub("LocalEntryNotFoundError", "cannot find the requested files"), "The hub can't be used"),
    (LOAD, from_the_hub("GatedRepoError", "401 Client Error"), "hf auth login"),
    (LOAD, RuntimeError("The NVIDIA driver on your system is too old (found version 11040)"), "lowvram-grpo doctor"),
    (STEP, RuntimeError("CUDA error: device-side assert triggered"), "token ids beyond"),
    (STEP, RuntimeError("CUDA error: no kernel image is available for execution"), "does not know the GPU"),
    (STEP, RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"), "NaN or infinite"),
    (STEP, RuntimeError("CUDA error: an illegal memory access was encountered"), "--fused-loss off"),
    (STEP, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "GPU memory ran out"),
    (SAVE, OSError(errno.ENOSPC, "No space left on device"), "checkpoint-1 (No space left on device); free some space"),
    (SAVE, SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "free some"),
    (SAVE, FileNotFoundError(errno.ENOENT, "No such file or directory", "/runs/a"), "was the folder moved or deleted?"),
    (SAVE, NotADirectoryError(errno.ENOTDIR, "Not a directory", "/runs/a/b"), "was the folder moved or deleted?"),
    (SAVE, Exception("File too large (os error 27)"), "checkpoint-1 (File too large); free some space"),
    (SAVE, OSError(errno.EROFS, "Read-only file system", "/runs/a"), "(Read-only file system)"),
    (SAVE, OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
    (SAVE, OSError(errno.ENAMETOOLONG, "File name too long"), "path is too long"),
    (OPTIMIZER_FILE, RuntimeError("[inline_container.cc:672] . unexpected pos 64 vs 0"), "a part of it"),
    (LOG, OSError(errno.ENOSPC, "No space left on device", "/runs/a/metrics.jsonl"), "disk is full (/runs/a/me"),
    (LOG, OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
    (ADAPTER, SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
    (ADAPTER, FileNotFoundError(errno.ENOENT, "No such file", "/runs/a"), "was the folder moved or deleted?"),
    (EVALUATE, MemoryError(), "machine's own memory"),
    (EVALUATE, ConnectionError("reset by peer"), "check the network"),
]  # fmt: skip


@pytest.mark.parametrize(
    "place,error,words", FAULTS, ids=lambda v: str(v)[-40:] if isinstance(v, (str, Exception)) else ""
)
def test_a_fault_of_the_world_is_one_sentence(monkeypatch, capsys, job, tmp_path, place, error, words):
    monkeypatch.setattr(place, raising(error))
    evaluated = ["--eval-data", job["--data"], "--eval-split", "train[:2]"] if place == EVALUATE else []
    code, err = run(monkeypatch, capsys, "train", *[part for pair in job.items() for part in pair], *evaluated)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert words in lines[0], lines[0]


def test_a_bug_is_one_sentence_too_and_its_traceback_a_file(monkeypatch, capsys, job, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(STEP, raising(KeyError("surprise")))
    arguments = ["train", *[part for pair in job.items() for part in pair]]
    code, err = run(monkeypatch, capsys, *arguments)
    assert code == 1 and "Traceback" not in err and "KeyError" in err and "bug of lowvram-grpo" in err
    (report,) = tmp_path.glob("lowvram-grpo-*.txt")
    assert str(report) in err and "KeyError: 'surprise'" in report.read_text(encoding="utf-8")
    assert "transformers" in report.read_text(encoding="utf-8").splitlines()[1]


def test_a_fault_in_the_middle_says_what_is_kept(monkeypatch, capsys, job, tmp_path):
    """After a fault of the machine the last checkpoint counts, not what is in memory."""
    from lowvram_grpo.training.trainer import GRPOTrainer

    inner, arguments = GRPOTrainer.training_step, [part for pair in job.items() for part in pair]

    def step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", step)
    code, err = run(monkeypatch, capsys, "train", *arguments, "--max-steps=5", "--save-steps=2")
    assert code == 2 and "the GPU failed" in err and "2 steps are kept" in err and f"--resume {tmp_path / 'run'}" in err
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("body", ["def f(completions, **kwargs):\n    sys.exit(3)\n", "sys.exit(3)\n"])
def test_a_reward_that_leaves_is_named(monkeypatch, capsys, job, tmp_path, body):
    (tmp_path / "leaves.py").write_text(f"import sys\n{body}", encoding="utf-8")
    arguments = [part for pair in {**job, "--reward": f"{tmp_path / 'leaves.py'}:f"}.items() for part in pair]
    code, err = run(monkeypatch, capsys, "train", *arguments)
    assert code == 2 and "SystemExit: 3" in err, err


def test_a_signal_inside_a_reward_is_not_the_rewards(monkeypatch, capsys, job, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import signal\ndef f(completions, **kwargs):\n    signal.raise_signal(signal.SIGTERM)\n", encoding="utf-8"
    )
    arguments = [part for pair in {**job, "--reward": f"{tmp_path / 'slow.py'}:f"}.items() for part in pair]
    code, err = run(monkeypatch, capsys, "train", *arguments)
    assert code == 143 and "reward function" not in err, err


def test_a_broken_pipe_that_is_not_standard_output_is_no_silence(monkeypatch, capsys, job):
    monkeypatch.setattr(STEP, raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    code, err = run(monkeypatch, capsys, "train", *[part for pair in job.items() for part in pair])
    assert code == 2 and "A program that this one writes to" in err


def test_a_mistake_is_not_hidden_by_what_it_was_made_in(tmp_path):
    def wrong():
        try:
            (tmp_path / "none").read_bytes()
        except FileNotFoundError:
            return undefined  # noqa: F821

    assert explain(caught(wrong), settings={}) is None


def test_a_server_that_is_not_the_hub_is_not_called_the_hub():
    assert "hub" not in str(explain(ConnectionRefusedError(111, "Connection refused"), settings={}))


def test_a_file_that_could_not_be_read_is_not_called_unwritten(tmp_path):
    from tokenizers import Tokenizer

    assert "disk" not in str(explain(caught(lambda: Tokenizer.from_file(str(tmp_path / "none"))), settings={}))


def test_debug_prints_the_traceback_wherever_it_stands(monkeypatch, capsys, tmp_path):
    missing = ["--data", str(tmp_path / "none.jsonl"), "--model", str(tmp_path)]
    for arguments in (["--debug", "train", *missing], ["train", *missing, "--debug"]):
        code, err = run(monkeypatch, capsys, *arguments)
        assert code == 2 and "Traceback (most recent call last)" in err and err.count("error: ") == 1


@pytest.mark.parametrize(
    "command", [["chat", "--prompt", "a"], ["eval", "--reward=label", "--samples=0", "--max-completion-length=4"]]
)
def test_sampling_without_training_has_the_same_boundary(monkeypatch, capsys, job, command):
    monkeypatch.setattr(
        "lowvram_grpo.jobs.inference.load_policy", raising(ModuleNotFoundError("No flash_attn", name="flash_attn"))
    )
    data = ["--data", job["--data"]] if command[0] == "eval" else []
    code, err = run(monkeypatch, capsys, *command, "--model", job["--model"], *data, "--use-cpu")
    assert code == 2 and "pip install flash_attn" in err and "Traceback" not in err, err


def test_what_was_being_done_is_named(monkeypatch, capsys, job):
    monkeypatch.setattr(LOAD, raising(MemoryError()))
    _, err = run(monkeypatch, capsys, "train", *[part for pair in job.items() for part in pair])
    assert "while loading the model" in err


# What the settings of a person have to do with it ---------------------------------------------------------------------


def caught(work):
    with pytest.raises(Exception) as info:
        work()
    return info.value


def test_a_library_that_refuses_is_quoted_with_the_setting(tmp_path):
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    error = caught(lambda: get_scheduler("cosine_with_min_lr", optimizer, 0, 4))
    text = str(explain(error, settings={"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 1e-3}))
    assert text.startswith("transformers stopped: ValueError: ") and "--lr-scheduler-type; change or drop it." in text
    assert "learning" not in text.replace("learning rate", "")


def test_a_package_that_a_setting_asks_for(tmp_path):
    error = ImportError("You need to install `galore_torch` in order to use GaLore optimizers")
    assert suspects([error], {"optim": "galore_adamw", "max_steps": 3}) == ["optim"]
    assert "--optim" in str(explain(error, settings={"optim": "galore_adamw"}))


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("y"), AssertionError(), ValueError("ours")])
def test_our_own_errors_are_no_faults_of_the_world(error):
    assert explain(caught(raising(error)), settings={"model": "x"}) is None


def test_the_settings_are_those_that_a_person_set(tmp_path):
    recipe = resolve({"model": "m", "data": "d", "optim": "adamw_torch", "preset": "cpu"})
    assert recipe.given_settings() == {"model": "m", "data": "d", "optim": "adamw_torch", "preset": "cpu"}


def test_a_script_catches_it_as_a_value_error(config):
    """TRL raises ValueError where we have a sentence."""
    from lowvram_grpo.rewards.signatures import check_columns

    with pytest.raises(ValueError, match=r"temperature is 0; it must be above 0"):
        config(temperature=0)
    # It passes a clause for another library's ValueErrors as it is.
    with pytest.raises(ValueError, match=r"^the reward function 'needs' needs 'topic', which the data lacks"):
        check_columns([needs], ["prompt"])
    with pytest.raises(ValueError, match=r"^an entry is 'x', which is not of type float\.$"):
        resolve({"reward_weights": "1,x"})


def needs(completions, topic):
    return [0.0] * len(completions)


@pytest.mark.skipif(not hasattr(select, "poll"), reason="Windows has no poll, and no SIGPIPE to be named after")
def test_a_reader_that_is_gone_is_told_from_a_helper_that_is(monkeypatch):
    """`train | head`: what could not be written is no longer in the buffer when the question is asked."""
    code = "import sys\nfrom lowvram_grpo.faults import boundary\nwith boundary():\n    print('x', flush=True)\n"
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=60
    )
    os.close(writer)
    assert done.returncode == 141 and not done.stderr
