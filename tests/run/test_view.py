"""Numbers, sparklines, and a view that stays inside every terminal."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from lowvram_grpo.run.view import Glyphs, View, clean, duration, sparkline, trend

UTF8 = Glyphs.for_encoding("utf-8")


@pytest.mark.parametrize("encoding, arrows, blocks", [("utf-8", "↓→↑", 8), ("cp936", "↓→↑", 8), ("cp1252", "v-^", 8)])
def test_glyphs_fit_the_encoding(encoding, arrows, blocks):
    glyphs = Glyphs.for_encoding(encoding)
    assert glyphs.arrows == arrows and len(glyphs.blocks) == blocks
    "".join(vars(glyphs).values()).encode(encoding)
    assert (glyphs.dot, glyphs.ellipsis) == (("·", "…") if arrows == "↓→↑" else ("-", "..."))


@pytest.mark.parametrize("size", [(100, 30), (60, 30), (50, 20), (24, 12)])
def test_a_western_windows_console_gets_ascii_only(size):
    """It encodes in cp1252, or shows what comes through a pipe in cp850: nothing but ASCII is the same in both."""
    view = filled(Glyphs.for_encoding("cp1252"))
    view.notice, view.sample = "a long notice " * 20, ("a prompt " * 300, "the completion " * 300, 1.5, 3)
    text = "\n".join(lines_of(view, *size, "cp1252"))
    assert text.isascii() and "?" not in text and ("+-" in text or size[1] < 20)


@pytest.mark.parametrize("size", [(60, 40), (60, 24), (60, 15), (60, 12), (60, 11), (50, 16), (60, 8)])
def test_the_newest_notice_is_seen_once(size):
    """Above the view where there is room for it, inside where there is none: never in both places, nor nowhere."""
    view = filled(UTF8)
    view.history = {name: values for name, values in view.history.items() if "/" not in name}
    view.notice = "resuming from step 7, " + "as was asked for " * 4
    lines = lines_of(view, *size)
    above = size[1] - 1 - len(lines)
    assert any("resuming from step 7" in line for line in lines) is (above < 2), (above, lines)


@pytest.mark.parametrize(
    "history, expected",
    [([], 0), ([1.0], 0), ([1.0, 2.0], 1), ([2.0, 1.0], -1), ([3.0] * 20, 0), ([0, 10] * 10, 0), ([*range(30)], 1)],
)
def test_trend(history, expected):
    assert trend(history) == expected


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 20, UTF8.blocks) == UTF8.blocks
    assert sparkline([*range(1000)], 8, UTF8.blocks) == UTF8.blocks
    assert sparkline([2.0, 2.0], 20, UTF8.blocks) == "▄▄"
    assert sparkline([], 20, UTF8.blocks) == ""


def test_duration():
    assert [duration(s) for s in (None, 0, 200, 3723)] == ["-:--", "0:00", "3:20", "1:02:03"]


def test_clean_takes_out_escape_sequences():
    assert clean("a\x1b[31mb\tc\r\n狗") == "a\ufffd[31mb c\ufffd\n狗"


def filled(glyphs: Glyphs) -> View:
    view = View("lowvram-grpo", "a model on some data " * 9, glyphs, step=3, total_steps=9, phase="sampling " * 20)
    names = ["reward", "eval_reward", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio",
             "frac_reward_zero_std", "grad_norm", "learning_rate", "tokens_per_second", "step_time", "memory/peak_gib",
             *(f"rewards/function_number_{i}/mean" for i in range(5))]  # fmt: skip
    view.history = {name: [0.1, 0.5, 1e-7] for name in names}
    view.notice = "a long notice 狗 " * 20
    view.sample = ("a 狗 prompt " * 300 + "TAIL:", "the 狗 completion [/b] " * 300, 1.5, 3)
    return view


def lines_of(view: View, width: int, height: int, encoding: str = "utf-8") -> list[str]:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", newline="")
    console = Console(file=buffer, width=width, height=height, force_terminal=True, color_system=None)
    console.print(view.render(console))
    buffer.flush()
    return buffer.buffer.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("size", [(200, 60), (100, 30), (100, 18), (60, 20), (40, 12), (24, 6)])
def test_a_frame_leaves_the_last_line_free(size):
    lines = lines_of(filled(UTF8), *size)
    assert len(lines) < size[1]
    assert all(cell_len(line) <= size[0] for line in lines)
    assert "lowvram-grpo" in lines[0] and "step 3/9" in lines[1]
    if size[1] >= 18:
        text = "\n".join(lines)
        assert "TAIL:" in text and "the 狗 completion" in text and "function_numb" in text


def test_ascii_only_terminal():
    lines = lines_of(filled(Glyphs.for_encoding("ascii")), 100, 30, "ascii")
    assert any(line.startswith("+---") for line in lines)
    assert not any("?" in line for line in lines if "狗" not in line and "|" not in line)


def test_cold_start_rows_give_way_to_grpo():
    view = View("t", "s", UTF8, history={"cold_start/loss": [3.0, 2.0]})
    assert [row[1:] for row in view.rows()] == [("cold loss", "2.00", "↓")]
    view.history["reward"] = [1.0]
    assert [row[0] for row in view.rows()] == ["reward"]


def test_an_empty_view_says_that_it_waits():
    assert any("waiting for the first step" in line for line in lines_of(View("t", "s", UTF8), 100, 30))
