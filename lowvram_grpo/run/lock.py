"""One process a run directory: a lock that ends with the process that holds it.

The operating system keeps it, so a killed process leaves nothing to clear away. Process ids, which repeat in
containers, decide nothing: they stand in the file to be named.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lowvram_grpo.errors import UserError

NAME = "run.lock"
# Beyond what is written: Windows forbids others to read a byte that is locked.
_LOCKED_BYTE = 1 << 30
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
# Folders whose lock this process has.
_held: set[str] = set()


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """The run directory `folder` is this process's for the length of the block; blocks of one process may nest.

    Raises:
        UserError: another process has it, or the folder can't be written to.
    """
    key = os.path.realpath(folder)
    if key in _held:
        yield
        return
    file = _opened(folder)
    try:
        _lock(file, folder)
        _held.add(key)
        try:
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            file.flush()
            yield
        finally:
            _held.discard(key)
            with contextlib.suppress(OSError):
                file.truncate(0)
                _unlock(file)
    finally:
        # The file stays: whoever removed it could remove one that the next process has locked just now.
        file.close()


def _opened(folder: Path) -> IO[bytes]:
    try:
        return open(folder / NAME, "ab+", buffering=0)
    except OSError as error:
        raise UserError(
            f"Can't write to the run directory {folder} ({error.strerror or error}); see to its permissions."
        ) from error


def _lock(file: IO[bytes], folder: Path) -> None:
    """Not flock: a lock of fcntl's belongs to this process alone, and is not kept alive by the children that it forked.

    A network file system without locks (NFS without lockd, some FUSE mounts) answers with another error: there the run
    goes on without one, as it can't be told from a run that is alone. On NFS a lock holds across hosts.
    """
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCKED_BYTE)
    except OSError as error:
        if error.errno in _TAKEN:
            raise UserError(
                f"{folder} is in use by {_holder(file)}; wait until that one ends or stop it, or choose another "
                "--output-dir for a new run."
            ) from error


def _unlock(file: IO[bytes]) -> None:
    """Windows lets go of a lock some time after its file was closed, if nobody does before."""
    if os.name == "nt":
        import msvcrt

        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def _holder(file: IO[bytes]) -> str:
    try:
        file.seek(0)
        found = json.loads(file.read())
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
