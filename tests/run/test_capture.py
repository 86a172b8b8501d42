"""What is printed while it is captured goes into the log, and what is printed before and afterwards to the screen."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from lowvram_grpo.run.capture import Capture


@pytest.fixture
def captured(tmp_path):
    capture = Capture(tmp_path / "rewards.log", lambda sentence: None)
    capture.text = lambda: capture.path.read_text(encoding="utf-8") if capture.path.exists() else ""
    return capture


def test_a_handler_of_logging_made_by_a_function_lives_on(captured, capfd):
    logger = logging.Logger("late")
    for step in range(2):
        with captured:
            captured.of("chatty")
            if not logger.handlers:
                logger.addHandler(logging.StreamHandler())
            logger.warning("scored %d", step)
        logger.warning("the run's own %d", step)
    assert captured.text() == "--- chatty\nscored 0\n--- chatty\nscored 1\n"
    assert capfd.readouterr().err == "the run's own 0\nthe run's own 1\n"


def test_a_stream_of_its_own_around_standard_output_is_read_too(captured, capfd):
    for _ in range(2):
        with captured:
            captured.of("wraps")
            sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")
            print("wrapped")
    assert captured.text() == "--- wraps\nwrapped\n" * 2
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_what_waits_in_a_buffer_is_of_who_printed_it(captured, capfd, monkeypatch):
    screen = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", screen)
    print("before")
    with captured:
        captured.of("kept")
        print("by a function", file=screen)
    print("after", flush=True)
    assert captured.text() == "--- kept\nby a function\n"
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("harm", [lambda: sys.stdout.close(), lambda: sys.stdout.detach()], ids=["closed", "detached"])
def test_a_stream_that_is_gone_is_made_anew(captured, capfd, harm):
    for _ in range(2):
        with captured:
            captured.of("harms")
            print("written", flush=True)
            harm()
    print("after")
    assert captured.text() == "--- harms\nwritten\n" * 2
    assert capfd.readouterr().out == "after\n"
