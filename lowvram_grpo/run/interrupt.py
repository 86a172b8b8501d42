"""Ctrl-C ends a run at the end of its step, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import TrainerCallback


class StopAfterStep(TrainerCallback):
    """Turns the first SIGINT into a stop with a checkpoint after the step in progress."""

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell
        self.requested = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            control.should_training_stop = control.should_save = True

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Listen for SIGINT inside the block; without effect off the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _on_interrupt(self, signum, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.tell("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once.")
