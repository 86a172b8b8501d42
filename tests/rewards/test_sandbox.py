"""Programs that do what no reward should let them do. Each is run for real."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.rewards import sandbox, syscalls

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's")
FEW = sandbox.Limits(seconds=0.3)


@pytest.fixture(params=["landlock", "read-only"])
def files(request, monkeypatch):
    """With Landlock, and as on a kernel without it."""
    if request.param == "read-only":
        monkeypatch.setattr(sandbox, "_landlock", lambda: False)
    elif not sandbox._landlock():
        pytest.skip("this kernel has no Landlock")
    return request.param


def alive_in(folder):
    """Processes whose working folder is, or was, somewhere in `folder`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd").startswith(str(folder)):
                found.append(int(pid))
    return found


def test_a_program_reads_and_prints(files):
    outcome = sandbox.run("a, b = map(int, input().split()); print(a + b)", "3 4\n")
    assert outcome == ("done", 0, "7\n") and outcome.fine


def test_what_programs_use_works(files):
    source = """
import asyncio, collections, heapq, math, random, re, sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(2**26)
depth = lambda n: 0 if n == 0 else 1 + depth(n - 1)
thread = threading.Thread(target=lambda: print(depth(50_000)))
thread.start(); thread.join()
async def one(): return 1
print(asyncio.run(one()), __name__, {"b", "a", "c"} and sorted({"b", "a"}))
print(sys.stdin.read().split())
"""
    assert sandbox.run(source, "x y").output == "50000\n1 __main__ ['a', 'b']\n['x', 'y']\n"


def test_numpy_works():
    pytest.importorskip("numpy")
    assert sandbox.run("import numpy as np; print(np.linalg.solve(np.eye(2), [1, 2]).sum())", "").output == "3.0\n"


def test_exit_codes_and_errors_are_seen():
    assert sandbox.run("import sys; sys.exit(3)", "").code == 3
    assert sandbox.run("1 / 0", "") == ("done", 1, "")
    assert sandbox.run("def broken(:", "").code == 1


def test_it_begins_the_same_every_time():
    assert len({sandbox.run("print(list({'a', 'b', 'c', 'd', 'e'}))", "").output for _ in range(3)}) == 1


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)"], ids=["spins", "sleeps"])
@pytest.mark.parametrize(
    "stubborn", ["", "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15, 24)]\n"]
)
def test_a_hang_is_killed_in_time(monkeypatch, stubborn, source):
    monkeypatch.setattr(sandbox, "_START_SECONDS", 0.7)
    start = time.monotonic()
    assert sandbox.run(stubborn + source, "", FEW).ended == "time"
    assert time.monotonic() - start < 10


def test_output_is_cut():
    outcome = sandbox.run("import sys\nwhile True: sys.stdout.write('x' * 10_000_000)", "")
    assert outcome.ended == "output" and len(outcome.output) == sandbox.Limits().output_bytes and not outcome.fine


def test_output_on_the_other_stream_is_nobodys():
    assert sandbox.run("import sys; sys.stderr.write('x' * 10_000_000); print('fine')", "").output == "fine\n"


def test_memory_ends():
    said = sandbox.run("try: bytearray(3 << 30)\nexcept MemoryError: print('no')", "")
    assert said.output == "no\n"
    assert not sandbox.run("x = []\nwhile True: x.append(bytearray(1 << 24))", "").fine


def test_limits_can_not_be_raised_again():
    source = """
import resource
for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
    try: resource.setrlimit(limit, (-1, -1)); print("raised")
    except (ValueError, OSError): pass
"""
    assert sandbox.run(source, "") == ("done", 0, "")


def test_root_is_nobody_special(files):
    source = """
import ctypes
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
print(ctypes.CDLL(None).capget(header, data), sum(data))
"""
    assert sandbox.run(source, "").output == "0 0\n"


def test_no_file_outside_is_changed(files, tmp_path):
    victim = tmp_path / "thesis.txt"
    victim.write_text("years of work", encoding="utf-8")
    os.chmod(victim, 0o666)
    before = os.stat(victim)
    source = f"""
import os, shutil, socket
path, folder = {str(victim)!r}, {str(tmp_path)!r}
for attempt in (
    lambda: os.remove(path), lambda: open(path, "w"), lambda: open(path, "a").write("x"), lambda: open(path, "r+"),
    lambda: os.truncate(path, 0), lambda: os.rename(path, path + "2"), lambda: os.chmod(path, 0),
    lambda: os.utime(path, (0, 0)), lambda: os.link(path, "mine"), lambda: os.symlink(path, folder + "/link"),
    lambda: os.mkdir(folder + "/new"), lambda: open(folder + "/new", "w"), lambda: shutil.copy("program.py", folder),
    lambda: os.setxattr(path, "user.x", b"1"), lambda: os.chown(path, 1, 1), lambda: os.mkfifo(folder + "/fifo"),
    lambda: os.rmdir(folder), lambda: os.chroot(folder),
):
    try: attempt(); print("done")
    except OSError: pass
shutil.rmtree(folder, ignore_errors=True)
"""
    assert sandbox.run(source, "") == ("done", 0, "")
    after = os.stat(victim)
    assert victim.read_text(encoding="utf-8") == "years of work" and os.listdir(tmp_path) == ["thesis.txt"]
    assert (after.st_mode, after.st_mtime, after.st_uid) == (before.st_mode, before.st_mtime, before.st_uid)


def test_nothing_of_the_users_is_read(tmp_path):
    if not sandbox._landlock():
        pytest.skip("this kernel has no Landlock")
    secret = tmp_path / "secret"
    secret.write_text("the expected output", encoding="utf-8")
    for path in (secret, f"/proc/{os.getpid()}/environ", "/proc/self/environ", os.path.expanduser("~/.bashrc")):
        assert sandbox.run(f"print(open({str(path)!r}).read())", "").code == 1
    assert not sandbox.run(f"import os; print(os.listdir({str(tmp_path)!r}))", "").fine
    os.environ["LOWVRAM_TEST_TOKEN"] = "hf_secret"
    try:
        assert "hf_secret" not in sandbox.run("import os; print(dict(os.environ))", "").output
    finally:
        del os.environ["LOWVRAM_TEST_TOKEN"]


def test_a_project_that_is_its_own_virtual_environment_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert str(tmp_path / "lib") in sandbox._readable.__wrapped__()
    assert not {str(tmp_path), *map(str, tmp_path.parents)} & set(sandbox._readable.__wrapped__())


def test_it_has_a_folder_of_its_own_which_is_gone_afterwards(tmp_path, monkeypatch):
    if not sandbox._landlock():
        pytest.skip("this kernel has no Landlock")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    source = """
import os
open("notes", "w").write("kept"); print(open("notes").read(), os.environ["HOME"] == os.getcwd())
"""
    assert sandbox.run(source, "").output == "kept True\n" and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "source",
    [
        "f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20)); f.flush()",
        "for i in range(99): open(f'f{i}', 'wb').write(b'x' * (15 << 20))\nimport time; time.sleep(9)",
        "for i in range(2000): open(f'f{i}', 'w')\nimport time; time.sleep(9)",
        "import os\nfor i in range(2000): os.mkdir('d'); os.chdir('d')",
    ],
    ids=["a huge file", "many large files", "many files", "a deep tree"],
)
def test_the_disk_is_not_filled(tmp_path, monkeypatch, source):
    if not sandbox._landlock():
        pytest.skip("this kernel has no Landlock")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    start = time.monotonic()
    outcome = sandbox.run(source, "")
    assert not outcome.fine and time.monotonic() - start < 6 and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "attempt",
    [
        "os.remove('a')",
        "os.rename('b', 'a')",
        "os.open('.', os.O_RDWR | os.O_TMPFILE)",
        "os.posix_fallocate(file.fileno(), 0, 1 << 20)",
        "beyond_its_end()",
    ],
    ids=["removed", "replaced", "without a name", "allocated", "allocated beyond its end"],
)
def test_no_disk_is_taken_where_nobody_looks(attempt):
    if not sandbox._landlock():
        pytest.skip("this kernel has no Landlock")
    source = f"""
import ctypes, os
file = open("a", "wb"); open("b", "wb")
def beyond_its_end():
    if ctypes.CDLL(None).fallocate(file.fileno(), 1, ctypes.c_long(0), ctypes.c_long(1 << 20)) != 0: raise OSError
try: {attempt}; print("done")
except OSError: print("refused")
print(os.fstat(file.fileno()).st_blocks, sorted(os.listdir()))
"""
    assert sandbox.run(source, "").output == "refused\n0 ['a', 'b', 'program.py']\n"


def test_no_network(files):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = f"""
import ctypes, socket, urllib.request
for attempt in (
    lambda: socket.create_connection(("127.0.0.1", {port})), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    lambda: socket.socket(socket.AF_UNIX), lambda: urllib.request.urlopen("http://127.0.0.1:{port}"),
    lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", "/dev/log"),
    lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].connect("/dev/log"),
):
    try: attempt(); print("connected")
    except OSError as error: print(error.errno or "refused")
"""
        outcome = sandbox.run(source, "")
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert outcome.code == 0 and "connected" not in outcome.output and outcome.output.count("\n") == 6


def test_no_datagram_to_an_address_that_half_a_filter_takes_for_none(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an address has no room for long paths
    source = f"""
import ctypes, os, socket
libc, own = ctypes.CDLL(None), socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
libc.mmap.restype = ctypes.c_void_p
where = ctypes.c_void_p(libc.mmap(ctypes.c_void_p(1 << 32), ctypes.c_size_t(4096), 3, 0x100022, -1, 0))
assert where.value == 1 << 32
os.chdir({str(tmp_path)!r})
address = bytes([1, 0]) + b"log" + bytes(1)
ctypes.memmove(where, address, len(address))
print(libc.sendto(own.fileno(), b"x", ctypes.c_size_t(1), 0, where, len(address)))
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind("log")
        assert sandbox.run(source, "").output == "-1\n"
        log.settimeout(0.2)
        with pytest.raises(TimeoutError):
            log.recv(1)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(600)",
        "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)",
        "import multiprocessing as m; m.Process(target=print).start()",
        "import os; os.posix_spawn('/bin/sleep', ['sleep', '600'], {})",
    ],
    ids=["a fork bomb", "a daemon", "a child", "multiprocessing", "posix_spawn"],
)
def test_no_processes(files, source, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    outcome = sandbox.run(source, "")
    left = alive_in(tmp_path)
    for pid in left:
        os.kill(pid, 9)
    assert (outcome.ended, outcome.code, left) == ("done", 1, [])


def test_another_program_in_its_place_is_confined_too(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("x", encoding="utf-8")
    assert not sandbox.run(f"import os; os.execv('/bin/rm', ['rm', '-rf', {str(tmp_path)!r}])", "").fine
    assert victim.exists()


def test_a_bomb_of_threads_is_killed():
    source = """
import threading, time
threading.stack_size(1 << 15)
while True: threading.Thread(target=time.sleep, args=(60,)).start()
"""
    assert sandbox.run(source, "").ended == "threads"


def test_others_get_no_signal(files):
    source = """
import ctypes, fcntl, os, resource, signal
parent = os.getppid()
for attempt in (
    lambda: os.kill(parent, 0), lambda: os.kill(-1, 0), lambda: os.kill(1, 0), lambda: os.killpg(os.getpgid(parent), 0),
    lambda: os.pidfd_open(parent), lambda: fcntl.fcntl(0, fcntl.F_SETOWN, parent),
    lambda: os.sched_setaffinity(parent, {0}), lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
    lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE, (3, 3)), lambda: open(f"/proc/{parent}/environ", "rb"),
    lambda: open(f"/proc/{parent}/mem", "rb"),
):
    try: attempt(); print("done", flush=True)
    except (OSError, PermissionError): pass
if ctypes.CDLL(None).prctl(1, 0) != -1: print("outlives who waits for it")
for call in (101, 310, 311):  # ptrace, process_vm_readv, process_vm_writev
    if ctypes.CDLL(None).syscall(call, 16, parent, 0, 0, 0, 0) != -1: print(call, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    assert sandbox.run(source, "") == ("done", -15, ""), "its own signals it may have"


def test_it_dies_with_the_thread_that_waits_for_it(monkeypatch):
    started = []
    spawn = sandbox.subprocess.Popen
    monkeypatch.setattr(sandbox.subprocess, "Popen", lambda *a, **k: started.append(spawn(*a, **k)) or started[-1])
    monkeypatch.setattr(sandbox, "_watch", lambda process, *_: time.sleep(1.0) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sandbox.run("import time; time.sleep(600)", "")
    assert started[0].returncode == -9


def test_functions_are_called_with_arguments():
    source = "import sys\nprint('noise')\nclass Solution:\n    def add(self, a, b): return (a + b, {1: 'x'})"
    outcome = sandbox.run(source, "[1, 2]", function="add")
    assert outcome.fine and outcome.output.endswith('[3, {"1": "x"}]\n')
    assert not sandbox.run("x = 1", "[]", function="add").fine


def test_several_at_a_time():
    before = threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda n: sandbox.run(f"print(int(input()) * {n})", "2"), range(8)))
    assert [outcome.output for outcome in outcomes] == [f"{2 * n}\n" for n in range(8)]
    assert threading.active_count() <= before


def test_where_it_can_not_be_had_nothing_is_run(monkeypatch):
    anew = sandbox.why_not.__wrapped__
    assert anew() is None
    monkeypatch.setattr(sandbox.sys, "platform", "win32")
    assert "need Linux, whose kernel confines them, and this is win32" in anew()
    monkeypatch.undo()
    monkeypatch.setattr(syscalls, "why_not", lambda: "no system calls are known here for riscv64")
    assert "can't be confined here (no system calls are known here for riscv64)" in anew()
    monkeypatch.setattr(sandbox, "why_not", anew)
    with pytest.raises(UserError, match="so rewards that run them are refused"):
        sandbox.run("print(1)", "")


def test_a_child_that_can_not_confine_itself_runs_nothing(monkeypatch):
    command = sandbox._command

    def without_landlock(*arguments):  # the kernel says no
        built = command(*arguments)
        built[3] = built[3].replace(
            "; main()", "; import lowvram_grpo.rewards.landlock as l; l._RESTRICT = 9999; main()"
        )
        return built

    monkeypatch.setattr(sandbox, "_command", without_landlock)
    if not sandbox._landlock():
        pytest.skip("this kernel has no Landlock")
    outcome = sandbox._run("print('ran')", "", sandbox.Limits(), None)
    assert outcome.code == 97 and "ran" not in outcome.output
    assert "can't be confined here (OSError" in sandbox.why_not.__wrapped__()


def test_one_that_could_read_the_judge_runs_nothing(monkeypatch):
    command = sandbox._command

    def in_the_open(*arguments):  # neither Landlock nor user namespaces
        built = command(*arguments)
        patched = "import lowvram_grpo.rewards.sandbox_child as c; c._open_to_us = lambda pid: True"
        built[3] = built[3].replace("; main()", f"; {patched}; main()")
        return built

    monkeypatch.setattr(sandbox, "_command", in_the_open)
    outcome = sandbox._run("print('ran')", "", sandbox.Limits(), None)
    assert outcome.code == 97 and "ran" not in outcome.output
    assert "could read the memory of the process that judges it" in sandbox.why_not.__wrapped__()
