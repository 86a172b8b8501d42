"""What `lowvram-grpo eval` shows: progress on stderr, a table for each pass on stdout."""

from __future__ import annotations

from time import monotonic
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table

# Without a terminal to redraw, a line as often as this.
_SECONDS_A_LINE = 30.0
_SHARES = ("truncated", "frac_reward_zero_std")
_LABELS = {
    "reward": "reward",
    "reward_std": "std within groups",
    "frac_reward_zero_std": "dead groups",
    "truncated": "truncated",
    "length": "tokens a completion",
}


class Progress:
    """Completions done, tokens a second, time left. Used as a context manager."""

    def __init__(self, console: Console, total: int):
        self.console, self.total = console, total
        self.done = self.tokens = 0
        self.name, self._began, self._line = "", monotonic(), monotonic()
        self._bar: rich_progress.Progress | None = None
        if console.is_terminal:
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TextColumn("{task.fields[rate]}"),
                rich_progress.TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, rate="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str) -> None:
        self.name = name
        if self._bar is not None:
            self._bar.update(self._task, description=name)

    def add(self, completions: int, tokens: int) -> None:
        self.done, self.tokens = self.done + completions, self.tokens + tokens
        rate = f"{self.tokens / max(monotonic() - self._began, 1e-9):.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=rate)
        elif monotonic() - self._line >= _SECONDS_A_LINE:
            self._line = monotonic()
            self.console.print(f"{self.name}: {self.done}/{self.total} completions, {rate}")


def print_tables(found: dict[str, Any], console: Console) -> None:
    """A table for each pass: a row a metric, a column a policy, and the difference where there are two."""
    policies = found["policies"]
    for kind in next(iter(policies.values())):
        columns = {name: passes[kind]["metrics"] for name, passes in policies.items()}
        if "difference" in found:
            columns["difference"] = found["difference"][kind]
        table = Table(box=None, pad_edge=False, show_header=len(columns) > 1)
        table.add_column("")
        for name in columns:
            table.add_column(name, justify="right")
        for metric in next(iter(columns.values())):
            cells = [_cell(metric, column[metric], signed=name == "difference") for name, column in columns.items()]
            table.add_row(_label(metric, kind), *cells)
        console.print(f"[bold]{_title(kind, found['settings'])}[/bold]", soft_wrap=True)
        console.print(table)
        console.print()


def _title(kind: str, settings: dict[str, Any]) -> str:
    if kind == "greedy":
        return f"greedy, {settings['prompts']} prompts"
    heat = settings["filters"]["temperature"]
    return f"sampled, {settings['prompts']} prompts x {settings['samples']} completions at temperature {heat:g}"


def _label(metric: str, kind: str) -> str:
    if metric == "pass@1" and kind == "greedy":
        return "passes"
    return _LABELS.get(metric) or (f"  {metric[len('rewards/') :]}" if metric.startswith("rewards/") else metric)


def _cell(metric: str, value: dict[str, Any], *, signed: bool) -> str:
    """`0.312 ± 0.045`, shares in percent, differences with their sign (bold where their interval leaves out 0)."""
    mean, low, high = value["mean"], value["low"], value["high"]
    if mean != mean:
        return "-"
    share = metric in _SHARES or metric.startswith("pass@")
    scale, digits = (100, 1) if share else (1, 1 if metric == "length" else 3)
    unit = " %" if share else ""
    text = f"{mean * scale:{'+' if signed else ''}.{digits}f}{unit}"
    if high is not None:
        text += f" ± {(high - mean) * scale:.{digits}f}"
    return f"[bold]{text}[/bold]" if signed and low is not None and (low > 0 or high < 0) else text
