"""The suite's jobs: stopped, started again, gone on with; what travels; what each tier asks."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import time

import gpu_suite
import limits
import pytest
import tiers
from suite import Job, Suite

from lowvram_grpo.bench import rows as bench_rows
from lowvram_grpo.bench.rows import LOST, Rows
from lowvram_grpo.run import jsonl

# A job in a few milliseconds: no torch. Each step is a row; `kind` says how it ends.
SCRIPT = """
import json, os, signal, sys, time
out, kind = sys.argv[sys.argv.index("--out") + 1], sys.argv[sys.argv.index("--kind") + 1]
mine = set()
for line in open(out) if os.path.exists(out) else []:
    try:
        row = json.loads(line)
    except ValueError:
        continue
    if row.get("op") == "step" and row["kind"] == kind:
        mine.add(row["path"])
crashed = os.environ.get("LOWVRAM_CRASHED")
for i in range(4):
    if str(i) in mine:
        continue
    if kind == "hang" and i == 2:
        time.sleep(60)
    if kind == "crash" and i == 2 and not crashed:
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "stuck" and i == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    row = {"op": "step", "kind": kind, "path": str(i), "job": os.environ["LOWVRAM_JOB"], "crashed": crashed,
           "sdpa": os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED"), "pid": os.getpid()}
    with open(out, "a") as f:
        f.write(json.dumps(row) + "\\n")
    time.sleep(0.02 if not kind.startswith("slow") else 0.6)
"""
POSIX = pytest.mark.skipif(os.name != "posix", reason="by signals")


@pytest.fixture
def job(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return lambda kind, **more: Job(kind, str(script), ["--kind", kind], **{"least_s": 1.0, **more})


def steps(out, kind):
    return [r for r in jsonl.read(out / "rows.jsonl") if r.get("op") == "step" and r["kind"] == kind]


def run(out, *jobs, minutes=1.0):
    done = []
    suite = Suite(out, minutes, dry_run=True)
    suite.run(jobs, done)
    return {row["op"]: row for row in done}


def test_jobs_have_their_rows_and_the_cards_environment(tmp_path, job):
    done = run(tmp_path / "out", job("fine"), job("also"))
    assert done["fine"]["status"] == done["also"]["status"] == "ok" and done["fine"]["new_rows"] == 4
    assert {r["sdpa"] for r in steps(tmp_path / "out", "fine")} == {"1"}
    assert done["fine"]["rows_with_errors"] == 0 and not limits.coming_back(tmp_path / "out")


@POSIX
def test_a_crash_costs_the_others_nothing_and_is_gone_on_behind(tmp_path, job):
    done = run(tmp_path / "out", job("crash"), job("stuck"), job("fine"))
    found = steps(tmp_path / "out", "crash")
    assert [r["path"] for r in found] == ["0", "1", "2", "3"] and done["crash"]["status"] == "ok"
    # What it said last reaches the process that goes on.
    assert found[1]["crashed"] is None and "exit code -11" in found[2]["crashed"]
    assert "about to die" in found[2]["crashed"]
    # One that comes no further is not started for ever.
    assert done["stuck"]["status"] == "exit code -11" and len(steps(tmp_path / "out", "stuck")) == 1
    assert done["fine"]["status"] == "ok"


@POSIX
def test_a_hang_takes_its_own_time_and_no_more(tmp_path, job):
    started = time.monotonic()
    done = run(tmp_path / "out", job("hang", share=1), job("fine", share=1), minutes=0.2)
    assert time.monotonic() - started < 20
    assert done["hang"]["status"] == "out of time" and done["fine"]["status"] == "ok"


def test_jobs_run_side_by_side_where_there_is_room(tmp_path, job, monkeypatch):
    monkeypatch.setattr(Suite, "wide", property(lambda suite: True))
    done = run(tmp_path / "out", *(job(f"slow-{i}", beside="x") for i in range(3)))
    order = [r["job"] for r in jsonl.read(tmp_path / "out" / "rows.jsonl") if r.get("op") == "step"]
    # All three have begun before any has ended.
    assert len(order) == 12 and set(order[:9]) == set(done)
    assert {row["status"] for row in done.values()} == {"ok"}


DRIVER = """
import sys
from pathlib import Path
from suite import Job, Suite
out, script = Path(sys.argv[1]), sys.argv[2]
Suite(out, 1.0, dry_run=True).run([Job("slow", script, ["--kind", "slow"], least_s=1.0)], [])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parent")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_an_interrupted_suite_leaves_readable_rows_and_goes_on(tmp_path, job, how):
    out = tmp_path / "out"
    driver = DRIVER
    if how == signal.SIGTERM:
        driver = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda n, f: sys.exit(128 + n))\n" + DRIVER
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", driver, out, job("slow").script], env=environment,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    until = time.monotonic() + 60
    while len(steps(out, "slow")) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=30)
    child, written = steps(out, "slow")[0]["pid"], len(steps(out, "slow"))
    time.sleep(0.8)
    assert len(steps(out, "slow")) == written  # its job has ended with it
    # A row torn in the middle, as a process that dies while it writes leaves it.
    with open(out / "rows.jsonl", "a", encoding="utf-8") as file:
        file.write('{"op": "step", "kind": "slow", "pa')
    before = steps(out, "slow")
    assert 2 <= len(before) < 4
    run(out, job("slow"))
    assert [r["path"] for r in steps(out, "slow")] == ["0", "1", "2", "3"]
    assert {r["pid"] for r in before} == {child}


def test_a_torn_row_takes_no_other_with_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": ', encoding="utf-8")
    Rows(path, True, shared={"gpu": "cpu"}).add(op="c")
    assert [sorted(r)[0] for r in jsonl.read(path)] == ["a", "gpu"]


def test_a_process_whose_context_is_lost_ends_with_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_rows, "context_is_lost", lambda: True)
    shared = {"gpu": "Card"}
    Rows(tmp_path / "a.jsonl", True, shared=shared).add(op="x", error="an illegal memory access")  # by hand: stays
    monkeypatch.setenv("LOWVRAM_JOB", "sweep")
    rows = Rows(tmp_path / "a.jsonl", True, shared=shared)
    rows.add(op="y")
    with pytest.raises(SystemExit) as ended:
        rows.add(op="z", error="an illegal memory access")
    assert ended.value.code == LOST and [r["op"] for r in jsonl.read(rows.path)] == ["x", "y", "z"]


# Limits


def test_what_does_not_come_back_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"x")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"x")
    assert limits.coming_back(tmp_path) == []
    (tmp_path / "a" / "b" / "c").mkdir()
    (tmp_path / "a" / "b" / "c" / "deep").write_bytes(b"x")
    (tmp_path / "an odd name").write_bytes(b"x")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(limits.EACH + 1)
    wrong = limits.coming_back(tmp_path)
    assert len(wrong) == 3 and "large has 16.0 MiB" in wrong[2] and "deep" in wrong[0] and "odd" in wrong[1]
    for i in range(9):
        (tmp_path / f"more-{i}").write_bytes(b"")
    assert "14 files; 8 come back" in limits.coming_back(tmp_path)


def test_what_travels_is_what_git_does_not_ignore_and_what_is_carried(tmp_path):
    git = lambda *a: subprocess.run(["git", "-C", tmp_path, *a], check=True, capture_output=True)
    git("init", "-q")
    (tmp_path / ".gitignore").write_bytes(b"/.gpu-stage/\n*.log\n")
    (tmp_path / "kept.py").write_bytes(b"12345")
    (tmp_path / "left.log").write_bytes(b"x" * 999)
    (tmp_path / ".gpu-stage").mkdir()
    (tmp_path / ".gpu-stage" / "site.tar.xz").write_bytes(b"x" * 100)
    assert limits.travelling(tmp_path) == 5 + 100 + len("/.gpu-stage/\n*.log\n")


def test_this_checkout_may_travel():
    if not (gpu_suite.ROOT / ".git").exists():
        pytest.skip("no checkout")
    # Beside it there must be room for the packages (7 MiB) and a small model (18 MiB).
    assert limits.travelling(gpu_suite.ROOT, "none") < limits.CARRIED - 30 * limits.MIB


def test_the_commands_to_paste_fit_and_name_the_tiers():
    blocks = re.findall(r"timeout_s (\d+):\n((?:    .+\n)+)", gpu_suite.__doc__)
    assert [int(seconds) for seconds, _ in blocks] == [150, 300, 300]
    for (seconds, command), tier in zip(blocks, tiers.TIERS):
        assert f"--tier {tier} --out $OUT" in command and len(command) <= limits.COMMAND
        # Half a minute for the packages, the imports and what is still running at the end.
        assert 60 * tiers.MINUTES[tier] <= int(seconds) - 20


# Tiers


class Stop(Exception):
    pass


@pytest.mark.parametrize("wide", (True, False))
@pytest.mark.parametrize("tier", tiers.TIERS)
def test_every_job_is_called_as_its_script_takes_it(tier, wide, monkeypatch, tmp_path):
    """Also what is only asked on a GPU."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, given=None, namespace=None):
        parse(parser, sys.argv[1:])
        raise Stop

    found = tiers.jobs([tier], wide)
    names = [job.name for job in found]
    assert len(set(names)) == len(names)
    if wide:  # one folder for the jobs that go together, no other between them
        groups = [job.beside for job in found if job.beside]
        assert len([g for g, before in zip(groups, [None, *groups]) if g != before]) == len(set(groups))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    for job in found:
        module = importlib.import_module(job.script.removesuffix(".py"))
        for args in (job.args, job.dry):
            if args is not None:
                given = [job.script, "--out", str(tmp_path / "x"), *map(str, args), "--minutes", "1.00", "--dry-run"]
                monkeypatch.setattr(sys, "argv", given)
                with pytest.raises(Stop):
                    module.main()


def test_kernels_are_asked_for_what_there_is():
    import bench_kernels

    for tier in tiers.TIERS:
        for job in tiers.jobs([tier], True):
            if job.script == "bench_kernels.py":
                for args in filter(None, (job.args, job.dry)):
                    bench_kernels.parse(["--out", "unused", *map(str, args)])
    with pytest.raises(SystemExit):
        bench_kernels.parse(["--out", "unused", "--shapes", "width-1"])


def test_only_takes_names_and_parts():
    args = gpu_suite.parsed(["--tier", "smoke", "--only", "smoke-oom,tests"])
    assert {job.name for job in tiers.jobs(args.tiers, False, args.only)} == {"smoke-oom", "tests-0"}
    assert args.minutes == tiers.MINUTES["smoke"]
    with pytest.raises(SystemExit):
        gpu_suite.parsed(["--only", "nothing"])


def test_ctrl_c_sums_up_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_suite.Suite, "run", stopped)
    monkeypatch.setattr(gpu_suite.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--tier", "smoke", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main()
    said = capsys.readouterr().out
    assert stop.value.code == 130 and "== summary" in said and "the same command goes on" in said
