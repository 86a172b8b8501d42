"""Landlock (Linux 5.13 and later): a process gives up all files but those it names, for itself and whatever it becomes.

Standard library only; it runs in the child process (sandbox_child.py). https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Iterable

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_ASK_VERSION, _BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _MAKE_REG, _TRUNCATE = (1 << bit for bit in (0, 1, 2, 3, 8, 14))
_FOR_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15
# How many rights to files each version of the interface knows.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# Files alone: without folders of its own a program can't build a tree that nobody can delete. None is removed: its name
# would be gone from the folder, where what it takes is counted, and the file still there.
_OWN = _READ | _WRITE_FILE | _MAKE_REG | _TRUNCATE
_PR_SET_NO_NEW_PRIVS = 38


def version() -> int:
    """Of the kernel's Landlock; 0 where there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, _libc().syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(_ASK_VERSION)))


def restrict(own: str, readable: Iterable[str], devices: Iterable[str]) -> None:
    """Leave to this process the files in the folder `own`, what is beneath `readable` to read, and `devices`. Where the
    kernel can, also no TCP, no abstract sockets and no signals to processes outside.

    Raises:
        OSError: the kernel refuses it.
    """
    libc, known = _libc(), version()
    handled = (1 << _RIGHTS.get(known, 16)) - 1
    attributes = struct.pack("QQQ", handled, 3, 3)[: 8 if known < 4 else 16 if known < 6 else 24]
    ruleset = _done(libc.syscall(_CREATE, ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)), 0))
    for paths, rights in (([own], _OWN), (readable, _READ), (devices, _READ_FILE | _WRITE_FILE)):
        for path in paths:
            try:
                opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:  # not every system has each of them
                continue
            allowed = rights & handled & (~0 if stat.S_ISDIR(os.fstat(opened).st_mode) else _FOR_FILES)
            rule = ctypes.c_char_p(struct.pack("=Qi", allowed, opened))
            _done(libc.syscall(_ADD_RULE, ruleset, _BENEATH, rule, ctypes.c_uint(0)))
            os.close(opened)
    _done(libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
    _done(libc.syscall(_RESTRICT, ruleset, ctypes.c_uint(0)))
    os.close(ruleset)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _done(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "landlock")
    return result
