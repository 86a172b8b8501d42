"""One process a run directory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from lowvram_grpo.errors import UserError
from lowvram_grpo.run import lock

HOLDER = """
import sys, time
from pathlib import Path
from lowvram_grpo.run.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the run directory `tmp_path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_is_first_and_a_killed_one_is_taken_over_from(holder, tmp_path):
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on \S+; .*--output-dir"), lock.hold(tmp_path):
        pass
    assert (tmp_path / lock.NAME).read_bytes()  # what the first wrote is still there
    holder.kill()
    holder.wait()
    with lock.hold(tmp_path):
        assert str(os.getpid()).encode() in (tmp_path / lock.NAME).read_bytes()
    assert (tmp_path / lock.NAME).read_bytes() == b""


def test_one_process_may_hold_it_twice_and_lets_go_at_the_end(tmp_path):
    code = "from pathlib import Path; from lowvram_grpo.run.lock import hold\nwith hold(Path({!r})): pass".format
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def other():
        arguments = [sys.executable, "-c", code(str(tmp_path))]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True)

    with lock.hold(tmp_path):
        with lock.hold(tmp_path / "." / ".." / tmp_path.name):
            pass
        assert f"in use by process {os.getpid()}" in other().stderr
    assert other().returncode == 0


def test_a_file_system_without_locks_does_not_stop_a_run(monkeypatch, tmp_path):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with lock.hold(tmp_path):
        pass


def test_a_directory_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match="Can't write to the run directory"), lock.hold(tmp_path / "none"):
        pass
