"""A device's checks and profiles: each tried once, every crash on one page, knobs turned and turned back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attempts
import crashes
import part_profile
import part_smoke
import pytest

from lowvram_grpo.bench.rows import Rows
from lowvram_grpo.run import jsonl


def rows_of(tmp_path, part="smoke"):
    return Rows(tmp_path / "rows.jsonl", True, shared={"gpu": "cpu", "commit": "c", "dry_run": True}, part=part)


def test_each_check_is_tried_once(tmp_path, monkeypatch):
    first = attempts.Attempts(rows_of(tmp_path))
    assert first.waiting("a") and first.waiting("b")
    first.begin("a")
    first.end("a", "passed")
    first.begin("b")
    # Stopped from outside: b is tried again.
    assert not attempts.Attempts(rows_of(tmp_path)).waiting("a")
    assert attempts.Attempts(rows_of(tmp_path)).waiting("b")
    # Ended by b: it is named, and what comes behind it is tried.
    monkeypatch.setenv("LOWVRAM_CRASHED", "exit code -11\nSegmentation fault")
    third = attempts.Attempts(rows_of(tmp_path))
    assert not third.waiting("b") and third.waiting("c")
    (row,) = [r for r in jsonl.read(third.rows.path) if r.get("status") == "crashed"]
    assert row["path"] == "b" and "Segmentation fault" in row["trace"]
    # Rows of another commit are another's.
    other = Rows(tmp_path / "rows.jsonl", True, shared={"gpu": "cpu", "commit": "d", "dry_run": True}, part="smoke")
    assert attempts.Attempts(other).waiting("a")


def test_tests_become_rows_and_one_that_ends_its_process_is_named(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert [1, 2] == [1, 3]\n"
        "@pytest.mark.skip(reason='no card')\n"
        "def test_left(): pass\n"
        "def test_dies(): os._exit(134)\n"
        "def test_behind(): raise RuntimeError('0x1f')\n",
        encoding="utf-8",
    )
    script, out = Path(attempts.__file__).with_name("part_tests.py"), tmp_path / "rows.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LOWVRAM_COMMIT": "c0ffee"}
    call = lambda **more: subprocess.run([sys.executable, script, "--out", out, file], env={**environment, **more},
                                         capture_output=True, text=True).returncode  # fmt: skip
    assert call() == 134
    assert call(LOWVRAM_CRASHED="exit code 134") == 0
    found = {r["path"].split("::")[1]: r for r in jsonl.read(out) if r["op"] == "check"}
    assert {name: r["status"] for name, r in found.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_left": "skipped", "test_dies": "crashed",
        "test_behind": "failed",
    }  # fmt: skip
    assert "assert [1, 2] == [1, 3]" in found["test_bad"]["trace"] and "no card" in found["test_left"]["why"]
    assert "RuntimeError" in found["test_behind"]["signature"]
    page = crashes.page(jsonl.read(out))
    assert "1 passed, 2 failed, 1 ended their process, 1 skipped; 3 distinct faults." in page


def test_every_crash_is_on_the_page_once():
    shared = {"gpu": "Card", "commit": "c0ffee", "versions": {"torch": "2"}, "dry_run": False}
    trace = lambda n: (
        f'  File "/x/kernels/sweep/fold.py", line 7, in fold\nRuntimeError: launch of {n} programs failed at 0x{n}'
    )
    failed = [
        {**shared, "part": "tests", "op": "check", "path": f"t::{n}", "status": "failed", "trace": trace(n),
         "signature": attempts.signature(trace(n))} for n in range(5)
    ]  # fmt: skip
    other = "E   AssertionError: no\ntests/gpu/test_a.py:12: AssertionError"
    rows = [
        *failed,
        {**shared, "part": "tests", "op": "check", "path": "t::o", "status": "failed", "trace": other,
         "signature": attempts.signature(other)},
        {**shared, "part": "smoke", "op": "check", "path": "oom", "status": "passed"},
        {**shared, "part": "smoke", "op": "began", "path": "fused"},
        {**shared, "part": "tests", "op": "collected", "tests": ["t::0", "t::never"]},
        {**shared, "part": "suite", "op": "demo", "status": "out of time", "seconds": 9.0},
        {**shared, "part": "train", "op": "demo", "model": "bundled", "error": "exit code 1: no such thing"},
    ]  # fmt: skip
    page = crashes.page(rows)
    assert "2 distinct faults" in page and page.count("[1] 5 x  kernels/sweep/fold.py:7") == 1
    assert page.count("launch of 0 programs failed") == 2 and "launch of 3" not in page  # first lines, and whole
    assert "[2] 1 x  tests/gpu/test_a.py:12" in page
    assert "begun and not ended (it hangs, or time ran out): fused" in page and "never begun: 1: t::never" in page
    # What was so at another commit may be mended.
    mended = [{**row, "commit": "decade"} for row in rows if row.get("path") == "oom"]
    assert "1 passed, 0 failed" in crashes.page([*rows, *mended])
    assert "out of time" in page and "exit code 1: no such thing" in page


def test_the_smoke_checks_run_on_a_cpu(tmp_path):
    tried = attempts.Attempts(rows_of(tmp_path))
    check = part_smoke.Check(dry_run=True)
    if check.cuda:
        pytest.skip("about a machine without a GPU")
    for name in ("preset:8gb", "graphs:int8", "oom"):
        part_smoke.run(name, check, tried)
    found = {r["path"]: r for r in jsonl.read(tried.rows.path) if r["op"] == "check"}
    assert {r["status"] for r in found.values()} == {"passed"}, found
    assert found["oom"]["events"] and len(found["oom"]["loss"]) == 2


def test_a_check_that_fails_leaves_its_traceback(tmp_path, monkeypatch):
    tried, check = attempts.Attempts(rows_of(tmp_path)), part_smoke.Check(dry_run=True)
    monkeypatch.setattr(check, "_lower", lambda trainer: None)  # memory never runs out
    check._limit = {}
    part_smoke.run("oom", check, tried)
    (row,) = [r for r in jsonl.read(tried.rows.path) if r["op"] == "check"]
    assert row["status"] == "failed" and "the guard did not have to act" in row["trace"]


def test_gaps_are_what_nothing_fills():
    span = part_profile.Span
    work = [span("a", 0, 10), span("b", 5, 8), span("c", 12, 20), span("a", 50, 60)]
    assert part_profile.gaps(work) == [(30, "c", "a", 50), (2, "a", "c", 12)]
    assert part_profile.busy(work) == 28
    host = [span("outer", 0, 100), span("inner", 45, 55)]
    found = part_profile.summary(work, host)
    assert found["total_us"] == 60 and found["kernels"][0] == {"us": 20, "calls": 2, "name": "a"}
    assert found["gaps"][0]["host"] == "inner" and found["launches"] == 4
    text = part_profile.text("a step", found)
    assert "47% of them busy" in text and "c -> a   [inner]" in text
    assert part_profile.text("none", part_profile.summary([], []))


def test_knobs_are_turned_and_turned_back():
    import part_knobs

    from lowvram_grpo.rollout import decode, engine

    before, run_before, seen = decode.PREFILL_TOKENS, engine.run, []
    with part_knobs.turned("prefill_tokens", 7):
        assert decode.PREFILL_TOKENS == 7
    assert before == decode.PREFILL_TOKENS
    real, decode.run = decode.run, lambda decoder, look_every=None: seen.append(look_every)
    try:
        with part_knobs.turned("look_every", 3):
            engine.run(None)
    finally:
        decode.run = real
    assert seen == [3] and engine.run is run_before
