"""The live view of a run in a terminal; one plain line a logged step when piped, in CI, or asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Mapping
from time import monotonic
from typing import Any

from rich.console import Console as RichConsole
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text
from transformers import TrainerCallback

from lowvram_grpo.faults import note_phase
from lowvram_grpo.run.best import is_evaluation
from lowvram_grpo.run.capture import Screen, screen
from lowvram_grpo.run.observer import Observer
from lowvram_grpo.run.view import Glyphs, View, clean, decimal, duration, percent, small

REFRESHES_PER_SECOND = 4
# The time of a step wanders with the length of its completions; the ETA takes the mean over this many.
ETA_WINDOW = 20
NOTICES_KEPT = 8


class ResizableLive(Live):
    """Draws anew on an empty screen, below the last notices, when the terminal's size has changed.

    A terminal that became narrower has wrapped the lines of the last frame: rich steps back over as many lines as it
    drew, and would leave the others standing.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.size = self.console.size
        self.notices: deque[Text] = deque(maxlen=NOTICES_KEPT)

    def process_renderables(self, renderables: list) -> list:
        found, size = super().process_renderables(renderables), self.console.size
        if size == self.size or not self.console.is_interactive:
            return found
        self.size = size
        clear = Control(ControlType.HOME, ControlType.CLEAR)
        return [clear, *self.notices, *found[1:]]  # the first one is the step back


class Console(Observer, TrainerCallback):
    """Shows a run as it goes. Used as a context manager, so that the terminal is left whole after an exception:

        with Console("lowvram-grpo", "model on data", total_steps=100) as console:
            trainer.add_callback(console)
            trainer.train()

    Reads TRL's metric names, and beside them `tokens_per_second` and `memory/peak_gib`; a metric that is not logged
    has no row. Outside the `with` block everything is printed as plain lines.
    """

    def __init__(
        self,
        title: str,
        subtitle: str = "",
        total_steps: int | None = None,
        plain: bool | None = None,
        *,
        log_completions: bool = False,
    ):
        """
        Args:
            total_steps: optimizer steps; None takes it from the trainer when training begins.
            plain: None means plain unless stdout is a terminal that can redraw, and not in CI.
            log_completions: print samples in plain mode too (the live view always shows one).
        """
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a cp1252 or cp936 console can't carry what a model may write
        self.plain = _must_be_plain() if plain is None else plain
        self.log_completions, self.doing = log_completions, ""
        glyphs = Glyphs.for_encoding(getattr(sys.stdout, "encoding", None))
        self._view = View(title, subtitle, glyphs, total_steps=total_steps)
        self._lock = threading.RLock()
        self._live: ResizableLive | None = None
        self._logs_back: list[tuple[logging.StreamHandler, Any]] = []
        self._step_ends: deque[float] = deque(maxlen=ETA_WINDOW + 1)

    def __enter__(self) -> Console:
        if self.plain:
            self._print(f"{self._view.title}  {self._view.subtitle}".rstrip())
            return self
        stderr = sys.stderr
        rich = RichConsole(highlight=False, file=Screen(sys.stdout))
        self._live = ResizableLive(
            console=rich, get_renderable=lambda: self._render(rich), refresh_per_second=REFRESHES_PER_SECOND
        )
        self._live.start()
        self._logs_back = [(handler, handler.setStream(sys.stderr)) for handler in _handlers_of(stderr)]
        return self

    def __exit__(self, kind, error, traceback) -> None:
        note_phase(error, self.doing)
        for handler, stream in self._logs_back:
            handler.setStream(stream)
        self._logs_back = []
        if self._live is not None:
            with self._lock:
                self._view.phase = "" if kind is None else "stopped"
            live, self._live = self._live, None
            live.stop()

    @property
    def covers_output(self) -> bool:
        """Whether what other code prints would tear the live view, or drown a log. On a terminal that shows plain
        lines it may be a debugger's."""
        return not (self.plain and bool(getattr(sys.stdout, "isatty", lambda: False)()))

    def notice(self, text: str) -> None:
        """One line for the person at the screen: a warning, the result of a self-test. It stays in the scrollback."""
        with self._lock:
            self._view.notice = clean(text)
        line = Text(f"{self._view.glyphs.dot} {clean(text)}", style="yellow")
        self._print(line)
        if self._live is not None:
            self._live.notices.append(line)

    def table(self, text: str) -> None:
        """Lines that stay in the scrollback, as they are; of no notice's weight."""
        self._print(Text(clean(text), style="dim"))

    def phase(self, text: str) -> None:
        """What is being done now, such as "sampling 16 completions"; shown by the live view only."""
        self.doing = text
        with self._lock:
            self._view.phase = text

    def sample(self, prompt: str, completion: str, reward: float, step: int) -> None:
        """A completion to look at; `prompt` is cut to its end."""
        with self._lock:
            self._view.sample = (prompt, completion, reward, step)
        if self._live is None and self.log_completions:
            tail = " ".join(clean(prompt).split())[-120:]
            self._print(f"  sample of step {step}, reward {decimal(reward)}")
            self._print(f"    prompt: {tail}\n    completion: {clean(completion).strip()}")

    def on_train_begin(self, args, state, control, **kwargs):
        with self._lock:
            self._view.step = state.global_step
            if self._view.total_steps is None and state.max_steps > 0:
                self._view.total_steps = state.max_steps

    def on_step_begin(self, args, state, control, **kwargs):
        if not self._step_ends:
            self._step_ends.append(monotonic())

    def on_step_end(self, args, state, control, **kwargs):
        self._step_ends.append(monotonic())
        with self._lock:
            self._view.step = state.global_step
            self._view.eta = self._eta(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.log(state.global_step, logs or {})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Show one row of metrics. In plain mode rows of no step, such as HF's summary, are passed over; a step without
        a rollout of its own has no reward, and one that applied to no completion (NaN) is a reward, though none."""
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        with self._lock:
            self._view.step = max(step, self._view.step)
            for name, value in numbers.items():
                self._view.history.setdefault(name, []).append(value)
        found = next(filter(is_evaluation, values), "") if "reward" not in values else ""
        evaluation = found.removesuffix("reward")
        if self._live is None and (evaluation or {"reward", "loss"} & values.keys()):
            sampled = bool(evaluation) or "reward" in values
            self._print(self._line(step, numbers, prefix=evaluation, sampled=sampled))
        elif self._live is None and "cold_start/reward" in numbers:
            forms = {"loss": decimal, "reward": decimal, "dead_groups": percent}
            cold = {name: numbers.get(f"cold_start/{name}") for name in forms}
            parts = [f"{name.split('_')[0]} {forms[name](value)}" for name, value in cold.items() if value is not None]
            self._print("  ".join([f"cold start {numbers.get('cold_start/step', 0):.0f}", *parts]))

    def _line(self, step: int, numbers: dict[str, float], *, prefix: str, sampled: bool) -> str:
        """`prefix` is `eval_`, or `eval_NAME_` of one of several data sets; empty for a row of the training."""
        total = self._view.total_steps
        parts = [f"step {step}/{total}" if total else f"step {step}"]
        which = prefix.replace("_", " ")
        if sampled and prefix + "reward" not in numbers:
            parts.append(f"{which}reward none")
        for name, form in (
            ("reward", lambda v: f"{which}reward {decimal(v)} {self._view.arrow(prefix + 'reward')}"),
            ("kl", lambda v: f"kl {small(v)}"),
            ("entropy", lambda v: f"entropy {decimal(v)}"),
            ("entropy_coef", lambda v: f"entropy coef {small(v)}"),
            ("completions/mean_length", lambda v: f"length {v:.0f}"),
            ("completions/clipped_ratio", lambda v: f"truncated {percent(v)}"),
            ("frac_reward_zero_std", lambda v: f"dead {percent(v)}"),
            ("tokens_per_second", lambda v: f"{v:.0f} tok/s"),
        ):
            if prefix + name in numbers:
                parts.append(form(numbers[prefix + name]))
        if self._view.eta is not None:
            parts.append(f"eta {duration(self._view.eta)}")
        return "  ".join(parts)

    def _eta(self, step: int) -> float | None:
        """Seconds left at the pace of the last steps."""
        if self._view.total_steps is None or len(self._step_ends) < 2:
            return None
        pace = (self._step_ends[-1] - self._step_ends[0]) / (len(self._step_ends) - 1)
        return max(self._view.total_steps - step, 0) * pace

    def _render(self, rich: RichConsole):
        with self._lock:
            return self._view.render(rich)

    def _print(self, text: str | Text) -> None:
        # Never called with the lock held: rich holds its own while it asks for the next frame, which takes ours.
        if self._live is not None:
            self._live.console.print(Text(text) if isinstance(text, str) else text)
        else:
            print(text, file=screen(), flush=True)


def _is_number(value: Any) -> bool:
    """NaN is left out: a mean over nothing has no place in a curve."""
    with contextlib.suppress(TypeError, ValueError):
        return float(value) == float(value)
    return False


def _must_be_plain() -> bool:
    terminal = bool(getattr(sys.stdout, "isatty", lambda: False)())
    return not terminal or os.environ.get("TERM") in ("dumb", "unknown") or bool(os.environ.get("CI"))


def _handlers_of(stream: Any) -> list[logging.StreamHandler]:
    """Log handlers that write to `stream` itself (transformers' does), past the live view that would draw over them."""
    loggers = [
        logging.root,
        *(item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger)),
    ]
    handlers = (handler for logger in loggers for handler in logger.handlers)
    return [h for h in handlers if isinstance(h, logging.StreamHandler) and h.stream is stream]
