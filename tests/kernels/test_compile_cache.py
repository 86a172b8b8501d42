"""A kept result of the compile gate never stands for a kernel that has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import compile_cache
import gate
import pytest
from lowvram_grpo.kernels.runtime import HAS_TRITON

compiles = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
HERE = Path(__file__).parent
FOUND = {"shared_bytes": 0, "spills": 0, "registers": 16}

HELPERS = """
from lowvram_grpo.kernels.runtime import jit, tl
ONE = tl.constexpr(1)
@jit
def plus(x):
    return x + ONE
"""
KERNEL = """
from lowvram_grpo.kernels.runtime import jit, tl
from {helpers} import plus
@jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, plus(tl.load(at)))
"""
# Says of each attempt whether it was taken from the cache; another attempt has modules of its own, so that only what
# stands in them can be what is recognized.
ATTEMPTS = """
import importlib, json, sys
from pathlib import Path
sys.path[:0] = [{here!r}, {folder!r}]
import gate
def attempt(name, helpers, kernel, cc=80, kind="*fp32:16", block=64, warps=4, **options):
    Path({folder!r}, f"helpers_{{name}}.py").write_text(helpers)
    Path({folder!r}, f"kernel_{{name}}.py").write_text(kernel.format(helpers=f"helpers_{{name}}"))
    importlib.invalidate_caches()
    function = importlib.import_module(f"kernel_{{name}}").kernel
    signature = {{"x_ptr": kind, "BLOCK": "constexpr"}}
    return gate.compile_for(function, signature, {{"BLOCK": block}}, cc, warps, **options).cached
HELPERS, KERNEL = {helpers!r}, {kernel!r}
found = {{}}
{attempts}
print(json.dumps(found))
"""


def outcomes(attempts, tmp_path):
    script = ATTEMPTS.format(here=str(HERE), folder=str(tmp_path), helpers=HELPERS, kernel=KERNEL, attempts=attempts)
    (tmp_path / "attempts.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "attempts.py"], capture_output=True, text=True, timeout=600,
        env=gate.environment() | {compile_cache.VARIABLE: str(tmp_path / "kept")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@compiles
def test_only_the_same_kernel_is_taken_from_the_cache(tmp_path):
    attempts = """
found["new"] = attempt("a", HELPERS, KERNEL)
found["the same elsewhere"] = attempt("b", HELPERS, KERNEL)
found["a line of the kernel"] = attempt("c", HELPERS, KERNEL.replace("tl.store(at, ", "tl.store(at, 2 * "))
found["a line of what it calls"] = attempt("d", HELPERS.replace("x + ONE", "x - ONE"), KERNEL)
found["a constant of what it calls"] = attempt("e", HELPERS.replace("constexpr(1)", "constexpr(3)"), KERNEL)
found["a type"] = attempt("f", HELPERS, KERNEL, kind="*fp16:16")
found["what is known of a type"] = attempt("g", HELPERS, KERNEL, kind="*fp32")
found["a constant"] = attempt("h", HELPERS, KERNEL, block=128)
found["a card"] = attempt("i", HELPERS, KERNEL, cc=90)
found["warps"] = attempt("j", HELPERS, KERNEL, warps=2)
found["an option"] = attempt("k", HELPERS, KERNEL, maxnreg=64)
found["the same again"] = attempt("l", HELPERS, KERNEL)
gate.__file__ = str(Path(sys.path[0], "compile_cache.py"))
found["what measures"] = attempt("m", HELPERS, KERNEL)
import triton
triton.__version__ += ".1"
found["Triton"] = attempt("n", HELPERS, KERNEL)
"""
    found = outcomes(attempts, tmp_path)
    assert {what for what, cached in found.items() if cached} == {"the same elsewhere", "the same again"}
    assert len(found) == 14


@compiles
def test_a_failure_is_not_kept_and_a_broken_entry_is_none(tmp_path):
    attempts = """
for name in ("first", "second"):
    try:
        attempt(name, HELPERS, KERNEL.replace("plus(", "plus(plus, "))
    except Exception as error:
        found[name] = type(error).__name__
kept = Path({kept!r})
found["entries"] = len(list(kept.glob("*/*")))
found["new"] = attempt("a", HELPERS, KERNEL)
(entry,) = kept.glob("*/*")
entry.write_text(entry.read_text()[:-9])
found["broken"] = attempt("b", HELPERS, KERNEL)
found["whole"] = attempt("c", HELPERS, KERNEL)
"""
    found = outcomes(attempts.replace("{kept!r}", repr(str(tmp_path / "kept"))), tmp_path)
    assert found.pop("first") == found.pop("second") == "CompilationError"
    assert found == {"entries": 0, "new": False, "broken": False, "whole": True}


@compiles
def test_the_gate_takes_what_it_has_found(tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path))
    first, second = (gate.run("--cc", "75", "--subset", "layer.nf4_dense") for _ in range(2))
    assert first and not any(found["cached"] for found in first) and all(found["cached"] for found in second)
    assert [found | {"cached": True} for found in first] == second


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"found": {}}', '{"key": "another", "found": {"spills": 0}}',
     '{"key": "abcd", "found": {"spills": "0"}}', '{"key": "abcd", "found": 3}', "\udcff"],
)  # fmt: skip
def test_what_is_no_entry_is_none(text, tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path))
    compile_cache.write("abcd", FOUND)
    assert compile_cache.read("abcd") == FOUND and compile_cache.read("abce") is None
    (path,) = tmp_path.glob("*/*")
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert compile_cache.read("abcd") is None


def test_readers_see_whole_entries_while_others_write(tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path))
    compile_cache.write("abcd", FOUND)
    writers = [
        threading.Thread(target=lambda: [compile_cache.write("abcd", FOUND) for _ in range(50)]) for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(compile_cache.read("abcd"))
    assert all(found == FOUND for found in seen)
    assert [path.name for path in tmp_path.glob("*/*")] == ["abcd.json"]


def test_what_nobody_asked_for_goes(tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path))
    for key in ("aaaa", "bbbb", "cccc"):
        compile_cache.write(key, FOUND)
    long_ago = time.time() - compile_cache.UNUSED_SECONDS - 60
    for path in tmp_path.glob("*/[ab]*"):
        os.utime(path, (long_ago, long_ago))
    assert compile_cache.read("aaaa") == FOUND
    compile_cache.prune()
    assert sorted(path.stem for path in tmp_path.glob("*/*")) == ["aaaa", "cccc"]


def test_the_folder(tmp_path, monkeypatch):
    for name in (compile_cache.VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert compile_cache.folder() == Path.home() / ".cache" / "lowvram-grpo" / "compile-gate"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.folder() == tmp_path / "lowvram-grpo" / "compile-gate"
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "mine"))
    assert compile_cache.folder() == tmp_path / "mine"
    # A file where the folder should be: nothing is kept, and nobody fails.
    (tmp_path / "mine").write_text("")
    compile_cache.write("abcd", FOUND)
    assert compile_cache.read("abcd") is None
    monkeypatch.setenv(compile_cache.VARIABLE, "")
    assert compile_cache.folder() is None and compile_cache.read("abcd") is None
    compile_cache.write("abcd", FOUND)
    compile_cache.prune()
