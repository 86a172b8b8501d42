"""What the console shows, as rich renderables: numbers, sparklines and the layout that fits the terminal's size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, pvariance
from time import monotonic

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WIDE, TABLE_WIDTH, SIDE_BY_SIDE_SPARE_LINES = 90, 52, 8
TREND_WINDOW = 5


@dataclass(frozen=True)
class Glyphs:
    """The characters beyond ASCII that are drawn with, or their stand-ins."""

    arrows: str  # down, flat, up
    blocks: str  # lowest to highest
    dot: str
    ellipsis: str

    @classmethod
    def for_encoding(cls, encoding: str | None) -> Glyphs:
        """All or none of them. UTF-8 and cp936 carry all; cp1252 has a dot and an ellipsis, but a Windows console
        that works in cp437 or cp850 shows their bytes as other characters."""
        fancy = cls("↓→↑", "▁▂▃▄▅▆▇█", "·", "…")
        try:
            "".join(vars(fancy).values()).encode(encoding or "utf-8")
        except (UnicodeEncodeError, LookupError):
            return cls("v-^", "_.-:=+*#", "-", "...")
        return fancy


def trend(history: Sequence[float]) -> int:
    """-1, 0 or 1: the mean of the last values against that of those before, if they differ by a standard error."""
    width = min(TREND_WINDOW, len(history) // 2)
    if not width:
        return 0
    recent, before = history[-width:], history[-2 * width : -width]
    change = fmean(recent) - fmean(before)
    noise = math.sqrt((pvariance(recent) + pvariance(before)) / width)
    return 0 if abs(change) <= noise + 1e-9 * abs(fmean(recent)) else int(math.copysign(1, change))


def sparkline(history: Sequence[float], width: int, blocks: str) -> str:
    """At most `width` characters; a longer history is averaged into `width` bins."""
    count = min(width, len(history))
    edges = [round(i * len(history) / count) for i in range(count + 1)] if count else [0]
    means = [sum(history[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, span = min(means), max(means) - min(means)
    top = len(blocks) - 1
    return "".join(blocks[round((mean - low) / span * top) if span else top // 2] for mean in means)


def duration(seconds: float | None) -> str:
    """`3:20`, `1:03:20`, or `-:--` when unknown."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clean(text: str) -> str:
    """`text` without control characters: a model may well sample an escape sequence."""
    return "".join(c if c == "\n" or c.isprintable() else " " if c == "\t" else "\ufffd" for c in text)


def decimal(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.095 or value == 0 else f"{value:.1e}"


def small(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 5e-5 or value == 0 else f"{value:.1e}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


# Metric, its label, its format, and whether its course says something.
COLD_START = "cold_start/"
ROWS = [
    (COLD_START + "loss", "cold loss", decimal, True),
    (COLD_START + "reward", "cold reward", decimal, True),
    (COLD_START + "dead_groups", "cold dead", percent, True),
    ("reward", "reward", decimal, True),
    ("rewards", "", decimal, True),  # stands for every rewards/<name>/mean
    ("eval_reward", "eval reward", decimal, True),
    ("kl", "kl", small, True),
    ("entropy", "entropy", decimal, True),
    ("entropy_coef", "entropy coef", small, True),
    ("aux_loss", "router loss", decimal, True),
    ("completions/mean_length", "length", lambda v: f"{v:.0f}", True),
    ("completions/clipped_ratio", "truncated", percent, True),
    ("frac_reward_zero_std", "dead groups", percent, True),
    ("grad_norm", "grad norm", decimal, True),
    ("learning_rate", "learning rate", lambda v: f"{v:.1e}", False),
    ("tokens_per_second", "tokens/s", lambda v: f"{v:.0f}", False),
    ("step_time", "step time", lambda v: f"{v:.1f} s", False),
    ("memory/peak_gib", "memory", lambda v: f"{v:.2f} GiB", False),
]


@dataclass
class View:
    """All that is on screen. `Console` fills it; `render` lays it out for the terminal as it is now."""

    title: str
    subtitle: str
    glyphs: Glyphs
    step: int = 0
    total_steps: int | None = None
    phase: str = ""
    eta: float | None = None  # seconds
    started: float = field(default_factory=monotonic)
    history: dict[str, list[float]] = field(default_factory=dict)
    notice: str = ""
    sample: tuple[str, str, float, int] | None = None  # prompt, completion, reward, step

    def arrow(self, metric: str) -> str:
        return self.glyphs.arrows[trend(self.history.get(metric, [])) + 1]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(metric, label, value, arrow) of everything seen so far, in the order of `ROWS`."""
        found = []
        for metric, label, form, course in ROWS:
            if metric == "rewards":
                named = [(name, name.removeprefix("rewards/").removesuffix("/mean")) for name in self.history
                         if name.startswith("rewards/") and name.endswith("/mean")]  # fmt: skip
            else:
                named = [(metric, label)] if metric in self.history else []
            if metric.startswith(COLD_START) and "reward" in self.history:
                continue  # over: its outcome stands in a notice
            for name, text in named:
                found.append((name, text, form(self.history[name][-1]), self.arrow(name) if course else ""))
        return found

    def render(self, console: Console) -> RenderableType:
        width, height = console.size
        rows = self.rows()
        if width >= WIDE and height >= len(rows) + SIDE_BY_SIDE_SPARE_LINES:
            body = max(len(rows), 6) + 2
            table = Panel(self._table(rows), box=box.ROUNDED, border_style="dim", height=body)
            grid = Table.grid(expand=True, padding=0)
            grid.add_column(width=TABLE_WIDTH)
            grid.add_column(ratio=1)
            grid.add_row(table, self._sample(width - TABLE_WIDTH, body))
            return Group(self._header(width, self.subtitle), self._progress(width, self.phase), grid)
        pairs = self._pairs(rows, width, max(height - 4, 1))
        # The last line stays free: a frame as high as the terminal makes it scroll.
        lines = height - 3 - pairs.row_count
        above, notice = self._lines_of_notice(console), []
        if lines - above < 4 and (lines - 1 >= 4 or lines < above):
            # Notices stand above the view. In a low terminal the sample, or the view itself, would push them out, so
            # the newest moves in.
            above, notice = 0, [self._one_line(f"{self.glyphs.dot} {self.notice}", width, "yellow")]
            lines -= 1
        sample = [self._sample(width, min(lines - above, 12))] if lines - above >= 4 else []
        return Group(self._header(width, self.phase or self.subtitle), self._progress(width), pairs, *sample, *notice)

    def _lines_of_notice(self, console: Console) -> int:
        """Lines that the newest notice takes above the view."""
        if not self.notice:
            return 0
        return len(Text(f"{self.glyphs.dot} {self.notice}").wrap(console, console.width))

    def _one_line(self, text: str, width: int, style: str) -> Text:
        line = " ".join(text.split())
        if cell_len(line) > width:
            line = set_cell_size(line, width - len(self.glyphs.ellipsis)) + self.glyphs.ellipsis
        return Text(line, style=style, no_wrap=True, overflow="crop")

    def _header(self, width: int, beside: str) -> Text:
        text = self._one_line(f"{self.title}  {beside}", width, "dim")
        text.stylize("not dim bold cyan", 0, len(self.title))
        return text

    def _progress(self, width: int, beside: str = "") -> RenderableType:
        total = f"/{self.total_steps}" if self.total_steps else ""
        step = f"step {self.step}{total}"
        times = f"{duration(monotonic() - self.started)} eta {duration(self.eta)}"
        bar = width // 4
        room = width - len(step) - bar - len(times) - 3 * 2
        if bar < 8 or room < 0:
            return self._one_line(f"{step}  {times}", width, "")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(
            Text(step),
            ProgressBar(total=self.total_steps or 1, completed=self.step, width=bar),
            Text(times),
            self._one_line(beside, room, "yellow"),
        )
        return grid

    def _table(self, rows: list[tuple[str, str, str, str]]) -> RenderableType:
        if not rows:
            return Text("waiting for the first step", style="dim")
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(width=16, no_wrap=True, overflow="crop", style="dim")
        table.add_column(width=9, justify="right", no_wrap=True, overflow="crop")
        table.add_column(width=1)
        table.add_column(width=18, no_wrap=True, overflow="crop", style="cyan")
        for metric, label, value, arrow in rows:
            spark = sparkline(self.history[metric], 18, self.glyphs.blocks) if arrow else ""
            table.add_row(label, Text(value, style="bold" if metric == "reward" else ""), arrow, spark)
        return table

    def _pairs(self, rows: list[tuple[str, str, str, str]], width: int, lines: int) -> Table:
        """The compact form: reward with its course on a line of its own, the rest two (or three) to a line."""
        columns = 3 if width >= WIDE else 2
        cell = width // columns - 1
        table = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(columns):
            table.add_column(width=cell, no_wrap=True, overflow="crop")
        name = max(min(cell - 11, 14), 6)
        cells = [Text(f"{label:<{name}.{name}}", style="dim").append(f"{value:>9} {arrow}", style="default")
                 for _, label, value, arrow in rows]  # fmt: skip
        if rows and rows[0][0] == "reward":
            cells.insert(1, Text(sparkline(self.history["reward"], cell, self.glyphs.blocks), style="cyan"))
        for first in range(0, min(len(cells), lines * columns), columns):
            table.add_row(*cells[first : first + columns])
        return table

    def _sample(self, width: int, height: int) -> RenderableType:
        if self.sample is None:
            return Panel(Text("no completion yet", style="dim"), box=box.ROUNDED, border_style="dim", height=height)
        prompt, completion, reward, step = self.sample
        inner, lines = max(width - 4, 1), max(height - 2, 1)
        prompt_lines = max(1, lines // 3)
        tail = " ".join(clean(prompt).split())
        if cell_len(tail) > inner * prompt_lines:
            room = inner * prompt_lines - len(self.glyphs.ellipsis)
            tail = self.glyphs.ellipsis + set_cell_size(tail[::-1], room)[::-1]
        text = Text(tail, style="dim")
        text.append("\n" + clean(completion).strip(), style="default not dim")
        title = f"step {step}  reward {decimal(reward)}"
        return Panel(text, box=box.ROUNDED, border_style="dim", title=title, title_align="left", height=height)
