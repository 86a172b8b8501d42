"""What other people's code writes to the screen, kept off it: it goes into a file of the run.

Output is caught where the operating system hands it on (file descriptors 1 and 2), so that what C code and child
processes write is caught as well as what is printed. Where there are no such descriptors (a notebook), what Python
prints is caught.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

# Of what one function writes in one call: the beginning and the end are kept.
KEPT_BYTES = 64 * 1024
# A log that is larger than this becomes FILE.1, and a new one begins.
LOG_BYTES = 4 * 2**20
_LINE = 200
_FDS = {"stdout": 1, "stderr": 2}

_active: list[Capture] = []


def screen(name: str = "stdout") -> Any:
    """Where a person reads: sys.stdout (or stderr), or what it was before output was captured."""
    return _active[-1].screens[name] if _active else getattr(sys, name)


class Screen:
    """`stream`, also while output is captured: for what is drawn from a thread of its own.

    Args:
        stream: sys.stdout or sys.stderr, as `name` says.
    """

    def __init__(self, stream: Any, name: str = "stdout"):
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(_active[-1].screens[self._name] if _active else self._stream, name)


class Streams:
    """Standard output and error as they are now; `restore` brings them back, closed ones too."""

    def __init__(self) -> None:
        self._python = {name: getattr(sys, name) for name in ("stdout", "stderr")}
        self._fds: dict[int, int] = {}
        for fd in (1, 2):
            with contextlib.suppress(OSError):
                self._fds[fd] = os.dup(fd)

    @property
    def known(self) -> list[int]:
        """The descriptors that are there."""
        return list(self._fds)

    def duplicate(self, fd: int) -> int | None:
        """A descriptor of its own for where `fd` led."""
        return os.dup(self._fds[fd]) if fd in self._fds else None

    def restore(self) -> None:
        """Once: what was kept for it is given back."""
        for fd, kept in self._fds.items():
            if not _same_file(fd, kept):
                os.dup2(kept, fd)
            os.close(kept)
        for (name, stream), fd in zip(self._python.items(), (1, 2)):
            if getattr(stream, "closed", False) and fd in self._fds:
                encoding = getattr(stream, "encoding", None)
                raw = io.FileIO(fd, "w", closefd=False)
                stream = io.TextIOWrapper(raw, encoding=encoding, errors="replace", write_through=True)
                setattr(sys, f"__{name}__", stream)
            setattr(sys, name, stream)
        self._fds = {}


def _same_file(fd: int, other: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.fstat(other))
    except OSError:
        return False


class Capture:
    """A context in which standard output and error go to the end of `path`, a header before what each function wrote.

    Args:
        tell: hears once of each function that writes, with its last line.
    """

    def __init__(self, path: str | Path, tell: Callable[[str], None]):
        self.path, self._tell = Path(path), tell
        self.screens: dict[str, Any] = {}
        self._name = ""
        self._told: set[str] = set()
        self._scratch: Any = None
        self._own: dict[str, TextIO] = {}

    def __enter__(self) -> Capture:
        _flush(sys.stdout, sys.stderr)  # what was printed before is no function's
        _flush_c()
        self._streams = Streams()
        if self._scratch is None:
            # Beside the log: /tmp may be memory. Where it can't be made, what is printed is lost, not the run.
            try:
                self._scratch = tempfile.TemporaryFile(dir=self.path.parent)
            except OSError:
                self._scratch = tempfile.TemporaryFile()
        self._covered: list[Any] = []
        self.screens = {name: self._aside(name, fd) for name, fd in _FDS.items()}
        _active.append(self)
        for fd in self._streams.known:
            os.dup2(self._scratch.fileno(), fd)
        for name in _FDS:
            setattr(sys, name, self._into_scratch(name))
        return self

    def of(self, name: str) -> None:
        """From here on it is the function `name` that writes."""
        self._write_down()
        self._name = name

    def __exit__(self, *exc: object) -> None:
        self._write_down()
        self._streams.restore()
        # A handler of logging that was made meanwhile keeps its stream, and may be anybody's.
        for name, stream in self._own.items():
            with contextlib.suppress(OSError, ValueError):
                os.dup2(_FDS[name], stream.fileno())
        _active.remove(self)
        for stream in self.screens.values():
            if isinstance(stream, _Aside):
                stream.close()

    def _into_scratch(self, name: str) -> TextIO:
        """The stream of that name that functions see: always the same, unless one of them has closed it."""
        try:
            os.dup2(self._scratch.fileno(), self._own[name].fileno())
        except (KeyError, OSError, ValueError):
            fd = os.dup(self._scratch.fileno())
            self._own[name] = open(  # noqa: SIM115 (kept)
                fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1
            )
        return self._own[name]

    def _aside(self, name: str, fd: int) -> Any:
        """The stream that sys.stdout or stderr was, past the descriptor that is redirected."""
        stream = getattr(sys, name)
        stream = getattr(stream, "rich_proxied_file", stream)
        try:
            on_screen = stream.fileno() == fd
        except (OSError, ValueError, AttributeError):
            on_screen = False
        if not on_screen or (kept := self._streams.duplicate(fd)) is None:
            return stream
        self._covered.append(stream)
        encoding = getattr(stream, "encoding", None)
        return _Aside(io.FileIO(kept, "w"), encoding=encoding, errors="replace", write_through=True)

    def _write_down(self) -> None:
        """Move what was written since the last call into the log."""
        _flush(*self._own.values(), *self._covered, sys.stdout, sys.stderr)
        _flush_c()
        size = os.fstat(self._scratch.fileno()).st_size
        if not size:
            return
        text = self._written(size)
        self._scratch.seek(0)
        self._scratch.truncate(0)
        with contextlib.suppress(OSError):
            if self.path.is_file() and self.path.stat().st_size > LOG_BYTES:
                os.replace(self.path, self.path.with_name(self.path.name + ".1"))
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(f"--- {self._name}\n{text.rstrip()}\n")
        if self._name and self._name not in self._told:
            self._told.add(self._name)
            last = text.rstrip().splitlines()[-1].strip()[:_LINE] if text.split() else "an empty one"
            self._tell(
                f"the reward function {self._name!r} writes to the screen: kept in {self.path} (said once). Its last "
                f"line: {last}"
            )

    def _written(self, size: int) -> str:
        self._scratch.seek(0)
        if size <= 2 * KEPT_BYTES:
            return self._scratch.read(size).decode("utf-8", "replace")
        head = self._scratch.read(KEPT_BYTES)
        self._scratch.seek(size - KEPT_BYTES)
        tail = self._scratch.read(KEPT_BYTES)
        left_out = f"\n... {size - 2 * KEPT_BYTES:,} bytes left out ...\n"
        return head.decode("utf-8", "replace") + left_out + tail.decode("utf-8", "replace")


class _Aside(io.TextIOWrapper):
    """Its class says that it is ours to close."""


def _flush(*streams: Any) -> None:
    for stream in streams:
        with contextlib.suppress(Exception):  # None, closed, or a function's own kind of stream
            stream.flush()


def _flush_c() -> None:
    """What C code has printed, but not written yet."""
    if os.name == "posix":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).fflush(None)
