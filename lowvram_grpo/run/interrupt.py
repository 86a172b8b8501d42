"""Ctrl-C and SIGTERM end a run at the end of its step, with a checkpoint; a second one, or one before the first step,
ends it at once. Where other people's code has caught that (a bare `except`), a third one ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

from lowvram_grpo.errors import Terminated
from lowvram_grpo.run.capture import screen

_SIGNALS = {
    signal.SIGINT: "stopping after this step, with a checkpoint; press Ctrl-C again to stop at once.",
    signal.SIGTERM: "asked to terminate: stopping after this step, with a checkpoint; a second SIGTERM stops at once.",
}


class StopAfterStep(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a stop with a checkpoint after the step in progress. Before training
    begins (checks, a cold start of many steps) there is nothing to keep, and it ends the process.

    Attributes:
        requested: the signal that came; None where none did.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell
        self.requested: int | None = None
        self._training = False
        self._asked = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            control.should_training_stop = control.should_save = True

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Listen inside the block; without effect off the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {signum: signal.signal(signum, self._on_signal) for signum in _SIGNALS}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame) -> None:
        if not self._training:
            self.tell("stopped before the first step: there is nothing to keep.")
        self._asked += 1
        if self._asked > 2:
            _leave(signum)
        if self.requested or not self._training:
            raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(128 + signum)
        self.requested = signum
        self.tell(_SIGNALS[signum])


def _leave(signum: int) -> None:
    """End the process as the signal does where nobody listens to it."""
    with contextlib.suppress(OSError, ValueError):
        stream = screen()
        stream.write("\x1b[?25h\n" if stream.isatty() else "\n")  # the live view hides the cursor
        stream.flush()
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
