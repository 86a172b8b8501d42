"""What a reward function may do to its process, and the run must not notice.

Reward functions run in the process that trains: that is what TRL's signature promises. What they may change of it by
mistake is put back when they return: the working directory, environment variables, PyTorch's switches, random numbers,
signal handlers, standard output. A function finds its own again at its next call. A process that it forks ends where
it would go on with the training, and what would end this one raises instead.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch

from lowvram_grpo.run.capture import Streams

# Setting -> how it is read and set. Grad mode is this thread's, the rest the process's.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "working directory": (os.getcwd, os.chdir),
    "dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "recursion": (sys.getrecursionlimit, sys.setrecursionlimit),
    "garbage": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
}
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)]
_ENDS_THE_PROCESS = ("_exit", "abort", "execv", "execve")
_exit = os._exit
# The tokens of a rollout are drawn with its seed as it is: noise in a reward must not be the same numbers.
_APART = 0x5EED

# Set on threads that a reward function has left behind, for who ends the process.
LEFT_BEHIND = "left_by_reward"


class World:
    """What reward functions see of the process, from one batch to the next."""

    def __init__(self) -> None:
        self._theirs: dict[str, Any] = {}
        self._environment: dict[str, str | None] = {}

    @contextmanager
    def entered(self, seed: int | None) -> Iterator[None]:
        """The run's process becomes theirs, and the run's again.

        Args:
            seed: of the global random numbers inside (`random`, NumPy, PyTorch): a resumed run draws the same. None:
                they go on from where they are.
        """
        ours, environment = _read(), dict(os.environ)
        drawn, signals, streams, threads = _random_numbers(), _Signals(), Streams(), set(threading.enumerate())
        _write(self._theirs)
        _change_environment(self._environment)
        if seed is not None:
            seed_all(seed)
        try:
            with _unending():
                yield
        finally:
            streams.restore()
            signals.restore()
            self._theirs = _read()
            _write(ours)
            self._environment = _difference(environment, dict(os.environ))
            _change_environment(_difference(dict(os.environ), environment))
            drawn()
            for thread in set(threading.enumerate()) - threads:
                setattr(thread, LEFT_BEHIND, True)


def seed_all(seed: int) -> None:
    """Seed `random`, NumPy and PyTorch on the CPU. PyTorch's own `manual_seed` would seed every card too."""
    seed += _APART
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)


@contextmanager
def one_process() -> Iterator[None]:
    """A process that is forked inside ends here, before it goes on with this one's work."""
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != owner:
            _exit(0)


@contextmanager
def _unending() -> Iterator[None]:
    """What would end or replace this process raises an error; forked ones may end."""
    owner, real = os.getpid(), {name: getattr(os, name) for name in _ENDS_THE_PROCESS if hasattr(os, name)}

    def refusing(name: str) -> Callable[..., NoReturn]:
        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            if os.getpid() != owner:
                real[name](*args, **kwargs)
            raise RuntimeError(f"os.{name} would end the training; raise an error instead, or use a subprocess")

        return refuse

    for name in real:
        setattr(os, name, refusing(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def _read() -> dict[str, Any]:
    found = {}
    for name, (get, _) in _SETTINGS.items():
        with contextlib.suppress(OSError):  # a working directory that was deleted
            found[name] = get()
    return found


def _write(wanted: dict[str, Any]) -> None:
    now = _read()
    for name, value in wanted.items():
        if name not in now or now[name] != value:
            with contextlib.suppress(OSError):
                _SETTINGS[name][1](value)


def _difference(before: dict[str, str], after: dict[str, str]) -> dict[str, str | None]:
    """Variables that differ, with their values after; None for those that are gone."""
    return {key: after.get(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def _change_environment(changes: dict[str, str | None]) -> None:
    for key, value in changes.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


def _random_numbers() -> Callable[[], None]:
    """What brings the global generators back to where they are now."""
    python, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    card = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        if card is not None:
            torch.cuda.set_rng_state(card)

    return restore


class _Signals:
    """Handlers, the alarm and what is blocked. Only the main thread may set them."""

    def __init__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._timer = hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > 0
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, []) if hasattr(signal, "pthread_sigmask") else None

    def restore(self) -> None:
        if not self._main:
            return
        if hasattr(signal, "setitimer") and not self._timer and signal.getitimer(signal.ITIMER_REAL)[0] > 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        if self._blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
