"""How reward functions are called: in this thread, in one of their own, on an event loop; never without an end."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from typing import Any

from lowvram_grpo.errors import Terminated, UserError
from lowvram_grpo.rewards.guards import one_process
from lowvram_grpo.rewards.outputs import Unanswered, failure

# How often a person's Ctrl-C is looked for while the batch waits for a thread.
_POLL_SECONDS = 0.2
# After so long a person is told what the run waits for; then after twice as long, and so on.
PATIENCE_SECONDS = 60.0


class Caller:
    """Calls functions, and waits for them.

    A function without a time limit runs in the thread that trains, as in TRL: there it may use signal.alarm, and
    Ctrl-C reaches it. With one it runs in a daemon thread, which is left behind when time is up.

    Args:
        timeout: seconds that a function may take on one batch; None waits forever.
        tell: hears what is waited for.
    """

    def __init__(self, timeout: float | None, tell: Callable[[str], None]):
        self.timeout, self.tell = timeout, tell
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, name: str, call: Callable[[], Any], finish: Callable[[Any], Any]) -> Any:
        """`finish` of what `call` returns; the sync function `name` is called.

        Raises:
            RewardFailure: it raised, or took too long.
        """

        def work() -> Any:
            with one_process():
                return finish(self._settled(name, call()))

        try:
            if self.timeout is not None:
                return self.wait(name, in_thread(f"reward-{name}", work), time.monotonic())
            with self._patient(name):
                return work()
        except (UserError, Terminated, KeyboardInterrupt):
            raise
        except BaseException as error:  # a script's main() may call sys.exit
            raise failure(name, error) from error

    def submit(self, name: str, call: Callable[[], Awaitable[Any]], finish: Callable[[Any], Any]) -> Future:
        """Begin a coroutine function. One loop for the whole run, in its own thread: clients that a function keeps stay
        bound to their loop, and a notebook has a loop running in this thread already."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True).start()

        async def work() -> Any:
            try:
                with one_process():
                    return finish(await call())
            except (UserError, Terminated):
                raise
            except (Exception, SystemExit) as error:  # named here: asyncio hands some on without their traceback
                raise failure(name, error) from error

        return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def wait(self, name: str, future: Future, start: float) -> Any:
        """The result of `future`, which began at `start` (monotonic seconds).

        Raises:
            Unanswered: it took too long.
            RewardFailure: it was cancelled.
        """
        with self._patient(name):
            while not wait([future], _POLL_SECONDS).done:
                if self.timeout is not None and time.monotonic() - start > self.timeout:
                    raise Unanswered(
                        f"the reward function {name!r} did not finish within {self.timeout:g} s; "
                        "make it faster or raise --reward-timeout."
                    )
        try:
            return future.result()
        except CancelledError as error:
            raise failure(name, error) from error

    def abandon(self, futures: list[Future]) -> None:
        """Cancel what is not done; a loop that a function blocks is left behind with it."""
        left = [future for future in futures if not future.done()]
        for future in left:
            future.cancel()
        if left and self._loop is not None:
            echo = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop)
            if not wait([echo], _POLL_SECONDS).done:
                self._loop = None

    def _settled(self, name: str, output: Any) -> Any:
        """What a plain function returned, awaited where that is a coroutine."""
        if not inspect.isawaitable(output):
            return output

        async def settle() -> Any:
            return await output

        return self.wait(name, self.submit(name, settle, lambda value: value), time.monotonic())

    @contextmanager
    def _patient(self, name: str) -> Iterator[None]:
        """Say what is waited for, from another thread: this one may be busy."""
        done = threading.Event()

        def watch() -> None:
            seconds = PATIENCE_SECONDS
            began = time.monotonic()
            while not done.wait(max(0.0, began + seconds - time.monotonic())):
                limit = "" if self.timeout is not None else " (--reward-timeout would end it)"
                self.tell(f"waiting for the reward function {name!r}, {seconds:.0f} s by now{limit}.")
                seconds *= 2

        threading.Thread(target=watch, name="patience", daemon=True).start()
        try:
            yield
        finally:
            done.set()


def in_thread(name: str, work: Callable[[], Any]) -> Future:
    """`work` begun in a daemon thread: one that hangs must not keep the process alive after the error."""
    future: Future = Future()
    future.set_running_or_notify_cancel()  # a result that nobody waits for any more is none too many

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
