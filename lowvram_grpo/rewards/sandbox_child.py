"""The child process of sandbox.py: gives up what a program has no use for, and becomes that program.

Its one argument is JSON: `folder` (with program.py in it), `parent` (the process that waits), `landlock` (whether the
kernel has it), `readable` (folders), the limits `seconds`, `memory_bytes` and `file_bytes`, and `function`, a name to
call or null. It is called with the arguments that standard input holds as JSON; what it returns follows `RESULT` on
standard output, as JSON too.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lowvram_grpo.rewards import landlock, syscalls
from lowvram_grpo.rewards.sandbox_protocol import REFUSED, RESULT

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP = 1, 24
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWUSER = 0x10000000
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def main() -> None:
    task = json.loads(sys.argv[1])
    source = Path(task["folder"], "program.py").read_text(encoding="utf-8")
    try:
        _give_up(task)
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(REFUSED)
    # As `python program.py` would find the world.
    sys.argv[:] = ["program.py"]
    # The folder alone: this package was in front of it.
    sys.path[0] = task["folder"]
    # Whose function is called is imported: what it does as a script, such as to read its input, is not asked for.
    program = ModuleType("program" if task["function"] else "__main__")
    sys.modules[program.__name__] = program
    arguments = json.loads(sys.stdin.read()) if task["function"] else None
    exec(compile(source, "program.py", "exec"), program.__dict__)
    if task["function"]:
        _call(program, task["function"], arguments)


def _give_up(task: dict[str, Any]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    # Whoever waits for this process may be killed first.
    libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != task["parent"]:
        raise OSError("nobody waits for it any more")
    os.chdir(task["folder"])
    for limit, value in (
        (resource.RLIMIT_CPU, math.ceil(task["seconds"])),
        (resource.RLIMIT_AS, task["memory_bytes"]),
        (resource.RLIMIT_FSIZE, task["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        # Not 0: that still starts the system's collector of crashes, where it has one.
        (resource.RLIMIT_CORE, 1),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    # Writing beyond a limit is an error that a program can read, not its end without a word.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if not task["landlock"]:
        # What Landlock forbids, too: to look into processes of the same user. They are in another namespace then.
        libc.unshare(_CLONE_NEWUSER)
    _drop_capabilities(libc)
    if task["landlock"]:
        landlock.restrict(task["folder"], task["readable"], _DEVICES)
    if _open_to_us(task["parent"]):
        raise OSError("it could read the memory of the process that judges it: no Landlock, no user namespaces")
    syscalls.install(read_only=not task["landlock"])


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """So that root, too, can't raise a limit again or read what is not its own."""
    number = 0
    while libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) == 0:
        number += 1
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _open_to_us(pid: int) -> bool:
    """Whether another process' memory and environment can be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb"):
            return True
    except OSError:
        return False


def _call(program: ModuleType, name: str, arguments: list) -> None:
    """A function of the program, or a method of its class `Solution` (LeetCode's form)."""
    function = getattr(program, name, None)
    if function is None:
        function = getattr(program.Solution(), name)
    returned = json.dumps(function(*arguments), default=_plain)
    sys.stdout.write(f"\n{RESULT}{returned}\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    """Arrays and the like as lists and numbers, other collections as lists."""
    return value.tolist() if hasattr(value, "tolist") else list(value)
