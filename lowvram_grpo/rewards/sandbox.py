"""Run a program that nobody has read: no network, no processes, no file but its own, bounded time, memory and output.

Linux only, without root and without a container. The child (sandbox_child.py) puts all of it on itself before it reads
the program's first line: resource limits, Landlock (landlock.py) for files and a seccomp filter (syscalls.py) for
everything else. Nothing of it can be taken off again. Where the kernel lacks Landlock, the filter refuses every change
of a file, though the program may read what its user may. Where it lacks seccomp, programs are not run at all.

This side watches the clock, the output, the folder and the threads, and kills.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

from lowvram_grpo.errors import UserError, one_line

# How often the folder and the threads are looked at.
_LOOK_SECONDS = 0.05
# A Python on a busy machine takes a while to begin.
_START_SECONDS = 2.0
_PROBE_SECONDS = 60.0
# What a program may read of its system.
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/sys/devices/system/cpu")
# And of each prefix of this Python.
_OF_PYTHON = ("bin", "lib", "lib64", "include", "share/zoneinfo", "pyvenv.cfg")
_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
        seconds: of CPU time, and of the clock.
        memory_bytes: of address space.
        output_bytes: that it may print.
        file_bytes: of a file, and four times that of all its files.
        files, threads: at a time.
    """

    seconds: float = 5.0
    memory_bytes: int = 1024 * _MIB
    output_bytes: int = 4 * _MIB
    file_bytes: int = 16 * _MIB
    files: int = 256
    threads: int = 256


class Outcome(NamedTuple):
    """How a program ended. `ended` is "done", or the limit that it was killed for: "time", "output", "files",
    "threads". `code` is its exit code, negative for a signal; `output` what it printed, at most `output_bytes`."""

    ended: str
    code: int
    output: str

    @property
    def fine(self) -> bool:
        return self.ended == "done" and self.code == 0


def run(source: str, given: str, limits: Limits = Limits(), function: str | None = None) -> Outcome:
    """Run a Python program in a folder of its own with `given` on its standard input.

    Args:
        function: called after the program has run, with the arguments that `given` holds as JSON (sandbox_child.py).

    Raises:
        UserError: there is no sandbox on this machine.
    """
    if reason := why_not():
        raise UserError(reason)
    return _run(source, given, limits, function)


def describe() -> str:
    """What protects this machine from a program, in one sentence.

    Raises:
        UserError: nothing does.
    """
    if reason := why_not():
        raise UserError(reason)
    files = (
        "no files but those of its own folder (Landlock)"
        if _landlock()
        else "no file can be changed, though the user's can be read (no Landlock in this kernel)"
    )
    return f"no network, no processes (seccomp); {files}; limits of time, memory and output"


@cache
def why_not() -> str | None:
    """Why no program can be run here, in a sentence; None where the sandbox works. It is tried once."""
    way_out = "train with another reward, or on Linux (WSL 2 is one)"
    if not sys.platform.startswith("linux"):
        return (
            f"rewards that run programs need Linux, whose kernel confines them, and this is {sys.platform}; {way_out}."
        )
    from lowvram_grpo.rewards import syscalls

    reason = syscalls.why_not()
    if reason is None:
        found = _run("print('confined')", "", Limits(seconds=_PROBE_SECONDS), None)
        reason = None if found.output == "confined\n" else one_line(found.output) or f"exit code {found.code}"
    return reason and f"programs can't be confined here ({reason}), so rewards that run them are refused; {way_out}."


def _run(source: str, given: str, limits: Limits, function: str | None) -> Outcome:
    with (
        tempfile.TemporaryDirectory(prefix="lowvram-grpo-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
    ):
        Path(folder, "program.py").write_text(source, encoding="utf-8", errors="replace")
        stdin.write(given.encode("utf-8", errors="replace"))
        stdin.seek(0)
        process = subprocess.Popen(
            _command(folder, limits, function),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            ended, output = _watch(process, folder, limits)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    return Outcome(ended, process.returncode, output.decode("utf-8", errors="replace"))


def _command(folder: str, limits: Limits, function: str | None) -> list[str]:
    # This package and no other, as symbolic.py does it; the child takes its place on the path again.
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path[:1] = [{root!r}]; from lowvram_grpo.rewards.sandbox_child import main; main()"
    task = {
        "folder": folder,
        "parent": os.getpid(),
        "landlock": _landlock(),
        "readable": _readable(),
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "function": function,
    }
    return [sys.executable, "-s", "-c", code, json.dumps(task)]


def _environment(folder: str) -> dict[str, str]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # Sets in the same order every time: the same program gets the same reward, in a run that goes on too.
    return {
        "PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1", **one_thread,
    }  # fmt: skip


@cache
def _landlock() -> bool:
    from lowvram_grpo.rewards import landlock

    return landlock.version() > 0


@cache
def _readable() -> list[str]:
    """This Python and its packages, wherever they are installed."""
    import sysconfig

    # No prefix as a whole: a project may be its own virtual environment, with data and secrets in it.
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix}
    within = {os.path.join(prefix, part) for prefix in prefixes for part in _OF_PYTHON}
    paths = {path for name, path in sysconfig.get_paths().items() if name != "data"}
    installed = {path for path in sys.path if path.rstrip("/").endswith(("site-packages", "dist-packages"))}
    return sorted({*_SYSTEM, *within, *paths, *installed})


def _watch(process: subprocess.Popen, folder: str, limits: Limits) -> tuple[str, bytes]:
    """Why it ended, and what it printed."""
    output, closed = bytearray(), False
    deadline = time.monotonic() + limits.seconds + _START_SECONDS
    stream: IO[bytes] = process.stdout
    os.set_blocking(stream.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        looked = time.monotonic()
        while not closed or process.poll() is None:
            if closed:  # it may run on without a standard output
                time.sleep(_LOOK_SECONDS)
            elif selector.select(_LOOK_SECONDS):
                piece = os.read(stream.fileno(), 1 << 16)
                output += piece
                closed = not piece
                if closed:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_LOOK_SECONDS)
            if len(output) > limits.output_bytes:
                return "output", bytes(output[: limits.output_bytes])
            now = time.monotonic()
            if now > deadline:
                return "time", bytes(output)
            if now - looked > _LOOK_SECONDS:
                looked = now
                if _too_many_threads(process.pid, limits.threads):
                    return "threads", bytes(output)
                if _too_much_written(folder, limits):
                    return "files", bytes(output)
    # The kernel ends who has used up its CPU time.
    return ("time" if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL) else "done"), bytes(output)


def _too_many_threads(pid: int, most: int) -> bool:
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > most
    except OSError:  # it has just ended
        return False


def _too_much_written(folder: str, limits: Limits) -> bool:
    size = count = 0
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        for file in files:
            with contextlib.suppress(OSError):
                found = file.stat(follow_symlinks=False)
                size += max(found.st_size, 512 * found.st_blocks)
            count += 1
            if size > 4 * limits.file_bytes or count > limits.files:
                return True
    return False
