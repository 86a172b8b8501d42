"""One process a compute capability runs tests on the mask; what it reports becomes tests out here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.masked_cuda import stub
from tests.masked_cuda.record import ROOT


def skip_unless_possible() -> pytest.MarkDecorator:
    reason = stub.why_not()
    return pytest.mark.skipif(reason is not None, reason=f"no masked CUDA here: {reason}")


def functions(files: list[str]) -> list[str]:
    """FILE::FUNCTION of every test in these files, which are not imported.

    `tests` elsewhere in this module may also name one case of a function: FILE::FUNCTION[CASE].
    """
    found = []
    for file in files:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        found += [f"{file}::{name}" for name in names if name.startswith("test_")]
    return found


class Masked:
    """Runs `tests` for one compute capability ("8.6"), once: their cases that are not marked `full`, or all."""

    def __init__(self, capability: str, tests: list[str], full: bool = False):
        self.capability, self.tests, self.full = capability, tests, full
        self.folder = tempfile.TemporaryDirectory()
        self.launches = Path(self.folder.name) / "launches.jsonl"

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        report = Path(self.folder.name) / "report.jsonl"
        environment = {
            **os.environ, "MASKED_CC": self.capability, "MASKED_REPORT": str(report), "HF_HUB_OFFLINE": "1",
            "MASKED_LAUNCHES": str(self.launches), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }  # fmt: skip
        # What pytest-xdist tells its workers is not for the process inside.
        environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "-p", "tests.masked_cuda.plugin", "-p", "no:cacheprovider",
             "-o", "python_files=test_*.py check_*.py", "-m", "" if self.full else "not full", *self.tests],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500,
        )  # fmt: skip
        if done.returncode not in (0, 1) or not report.exists():
            pytest.fail(f"the masked process ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
        return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]

    def passes(self, test: str) -> None:
        """Fails, or is skipped, as the function did in there; in all of its cases, unless `test` names one."""
        rows = [row for row in self.rows if test in (row["test"], row["test"].split("[")[0])]
        assert rows, f"{test} was not run"
        failed = [row for row in rows if row["outcome"] == "failed"]
        if failed:
            pytest.fail("\n\n".join(f"{row['test']}\n{row['why'][-3000:]}" for row in failed[:3]), pytrace=False)
        if all(row["outcome"] == "skipped" for row in rows):
            pytest.skip(rows[0]["why"])

    def launches_are_cases(self) -> None:
        """Every launch of the process is among the compile gate's cases."""
        found = self.launched
        assert found["compiled"] and not found["bad"], "\n".join(found["bad"])

    @cached_property
    def launched(self) -> dict[str, Any]:
        assert self.rows
        kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.masked_cuda.compiled", str(self.launches),
             self.capability.replace(".", "")],
            cwd=ROOT, env=kept, capture_output=True, text=True, timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)


def masked(capability: str, tests: list[str]):
    """(fixture, test of each of `tests`, test of all launches, test of each function of `tests` in all its cases,
    marked `full`) to be bound to names in a test module. One process runs whatever is asked for."""
    whole = list(dict.fromkeys(test.split("[")[0] for test in tests))

    @pytest.fixture(scope="module", name="there")
    def fixture(request) -> Iterator[Masked]:
        asked = [item for item in request.session.items if item.path == request.path]
        everything = any(item.get_closest_marker("full") for item in asked)
        there = Masked(capability, whole if everything else tests, everything)
        yield there
        there.folder.cleanup()

    @pytest.mark.parametrize("test", tests, ids=lambda test: test.removeprefix("tests/"))
    def passes(there, test):
        there.passes(test)

    def launches(there):
        there.launches_are_cases()

    @pytest.mark.full
    @pytest.mark.parametrize("test", whole, ids=lambda test: test.removeprefix("tests/"))
    def all_pass(there, test):
        there.passes(test)

    return fixture, passes, launches, all_pass
