"""The console as a trainer callback: plain lines, the live view, odd encodings, exceptions."""

from __future__ import annotations

import io
import logging
import math
import sys
from types import SimpleNamespace

import pytest

from lowvram_grpo.run import console as module
from lowvram_grpo.run.console import Console

LOGS = {"reward": 3.25, "kl": 0.004, "entropy": 0.81, "completions/mean_length": 43.2, "completions/clipped_ratio": 0.0,
        "frac_reward_zero_std": 0.25, "tokens_per_second": 412.0, "grad_norm": float("nan")}  # fmt: skip


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str = "utf-8", tty: bool = True):
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def stdout(monkeypatch):
    """Replaces sys.stdout by a terminal of the given kind."""
    for name in ("CI", "TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def install(*args, **kwargs) -> Terminal:
        terminal = Terminal(*args, **kwargs)
        monkeypatch.setattr(sys, "stdout", terminal)
        return terminal

    return install


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=100, is_world_process_zero=True)


def test_plain_line(stdout, monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 30.0])
    out = stdout(tty=False)
    with Console("lowvram-grpo", "m on d") as console:
        monkeypatch.setattr(module, "monotonic", lambda: next(clock))
        console.on_train_begin(None, state(10), None)
        for step in (11, 12):
            console.on_step_begin(None, state(step - 1), None)
            console.on_step_end(None, state(step), None)
            console.on_log(None, state(step), None, logs={**LOGS, "reward": LOGS["reward"] + step - 12})
        console.on_log(None, state(12), None, logs={"eval_reward": 4.0, "eval_kl": 0.005})
        console.on_log(None, state(12), None, logs={"train_runtime": 3.0})
    lines = out.text().splitlines()
    assert lines[0] == "lowvram-grpo  m on d"
    # 88 steps at the 10 s that each of the two took
    assert lines[2] == (
        "step 12/100  reward 3.25 ↑  kl 0.0040  entropy 0.81  length 43  truncated 0%  dead 25%  412 tok/s  eta 14:40"
    )
    assert lines[3:] == ["step 12/100  eval reward 4.00 →  kl 0.0050  eta 14:40"]


def test_cold_start_line(stdout):
    out = stdout(tty=False)
    console = Console("t")
    logs = {"cold_start/step": 5, "cold_start/loss": 2.5}
    console.on_log(None, state(0), None, logs=logs)
    console.on_log(None, state(0), None, logs={**logs, "cold_start/reward": 1.0, "cold_start/dead_groups": 0.4})
    assert out.text().splitlines() == ["cold start 5  loss 2.50  reward 1.00  dead 40%"]


@pytest.mark.parametrize("encoding, arrow", [("ascii", "-"), ("cp1252", "-"), ("cp936", "→"), ("utf-8", "→")])
@pytest.mark.parametrize("plain", [True, False])
def test_no_encoding_crashes(stdout, encoding, arrow, plain):
    out = stdout(encoding)
    with Console("lowvram-grpo", "模型", plain=plain, log_completions=True) as console:
        console.notice("警告 🐕 \x1b[2J")
        console.on_log(None, state(1), None, logs=LOGS)
        console.sample("prompt 🐕", "<answer>狗 [/bold] \x1b[2J</answer>", 1.0, 1)
    text = out.text()
    assert f"3.25 {arrow}" in text and "<answer>" in text and "\x1b[2J" not in text


@pytest.mark.parametrize(
    "tty, variables, plain",
    [(True, {}, False), (False, {}, True), (True, {"CI": "true"}, True), (True, {"TERM": "dumb"}, True)],
)
def test_plain_unless_in_a_terminal(stdout, monkeypatch, tty, variables, plain):
    stdout(tty=tty)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Console("t").plain is plain


def test_samples_in_plain_mode_only_when_asked(stdout):
    out = stdout(tty=False)
    for wanted in (False, True):
        Console("t", log_completions=wanted).sample("p" * 500, "the completion", 1.0, 7)
    lines = out.text().splitlines()
    assert lines[0] == "  sample of step 7, reward 1.00" and lines[2] == "    completion: the completion"
    assert len(lines) == 3 and len(lines[1]) < 140


def test_a_western_windows_console_gets_ascii_only(stdout, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    for plain in (True, False):
        out = stdout("cp1252")
        with Console("lowvram-grpo", "model on data", plain=plain, log_completions=True) as console:
            console.notice("a notice")
            console.on_log(None, state(1), None, logs=LOGS)
            console.sample("prompt " * 99, "<answer>x</answer>", 1.0, 1)
        assert out.text().isascii() and "?" not in out.text().replace("\x1b[?25", "") and "- a notice" in out.text()


def test_a_resize_leaves_nothing_of_the_last_frame(stdout, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "30")
    out = stdout()
    with Console("lowvram-grpo", "model on data", plain=False) as console:
        console.notice("first notice")
        console.on_log(None, state(1), None, logs=LOGS)
        console._live.refresh()
        assert "\x1b[2J" not in out.text()
        size = console._live.console.size
        console._live.console.size = (size.width - 20, size.height)
        console._live.refresh()
        console._live.refresh()
    before, _, after = out.text().partition("\x1b[H\x1b[2J")
    assert "\x1b[2J" not in after, "only once"
    assert before.count("first notice") == after.count("first notice") == 1, "the notices stay on screen"
    assert after.index("first notice") < after.index("lowvram-grpo")


def test_an_exception_leaves_the_terminal_whole(stdout, monkeypatch):
    out = stdout()
    error_stream = Terminal()
    monkeypatch.setattr(sys, "stderr", error_stream)
    logger = logging.getLogger("test_console")
    handler = logging.StreamHandler(error_stream)
    logger.addHandler(handler)
    try:
        with pytest.raises(RuntimeError, match="boom"), Console("t", plain=False) as console:
            console.phase("updating")
            logger.warning("through the view")
            raise RuntimeError("boom")
    finally:
        logger.removeHandler(handler)
    assert sys.stdout is out and sys.stderr is error_stream and handler.stream is error_stream
    text = out.text()
    assert "through the view" in text and error_stream.text() == ""
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"
    console.notice("afterwards")
    assert out.text().endswith("· afterwards\n")


def test_steps_without_a_reward_are_printed_too(capsys):
    with Console("t", plain=True, total_steps=4) as console:
        console.log(1, {"reward": math.nan, "kl": 0.0, "completions/mean_length": 8.0})
        console.log(2, {"eval_reward": math.nan, "eval_completions/mean_length": 7.0})
        console.log(2, {"eval_hard_reward": 0.5, "eval_hard_rewards/f/mean": 0.5, "eval_hard_kl": 0.005})
        console.log(3, {"train_runtime": 1.0})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].startswith("step 1/4  reward none  kl 0.0000  length 8")
    assert lines[1].startswith("step 2/4  eval reward none  length 7") and len(lines) == 3
    assert lines[2].startswith("step 2/4  eval hard reward 0.50") and "kl 0.0050" in lines[2]


def test_steps_without_a_rollout_of_their_own_have_a_line(capsys):
    with Console("t", plain=True, total_steps=2) as console:
        console.log(1, {"loss": 0.1, "reward": 2.0, "entropy_coef": 0.01})
        console.log(2, {"loss": 0.1, "kl": 0.5, "entropy_coef": 0.015})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].endswith("reward 2.00 →  entropy coef 0.0100")
    assert lines[1:] == ["step 2/2  kl 0.5000  entropy coef 0.0150"]
