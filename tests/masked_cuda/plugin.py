"""pytest -p tests.masked_cuda.plugin: tests on masked cuda:0 tensors; MASKED_CC=7.5 plays Turing (8.6 where unset).

MASKED_REPORT=FILE gets one JSON object a test (name, outcome, why), and MASKED_LAUNCHES=FILE each launch. Must be
loaded before torch: by -p, not from a conftest.
"""

from __future__ import annotations

# ruff: noqa: E402 (the order of these imports is what this module is about)
import json
import os

os.environ["TRITON_INTERPRET"] = "1"
from tests.masked_cuda import stub

stub.load()
import bitsandbytes  # noqa: F401  chooses its CPU library now, before torch.version.cuda says otherwise
import pytest
import torch
import torch._dynamo.trace_rules

torch._dynamo.trace_rules.get_torch_obj_rule_map()  # before its tables meet our stand-ins

from tests.masked_cuda import card, holes, launches
from tests.masked_cuda.record import RECORD

# Set for all who ask, so that tests may be smaller here.
CAPABILITY = tuple(int(x) for x in os.environ.setdefault("MASKED_CC", "8.6").split("."))
card.put(CAPABILITY)
holes.fill()
launches.watch()

import lowvram_grpo.kernels.runtime as runtime

runtime._INTERPRETED = False
holes.ours()

from tests.masked_cuda import references

references.put()


@pytest.fixture(autouse=True)
def _as_new():
    RECORD.clear()
    RECORD.capturing, RECORD.debug, RECORD.fault = None, 0, None
    card.CURRENT[:] = [card.DEFAULT]
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    path = os.environ.get("MASKED_REPORT")
    if path and (report.when == "call" or not report.passed):
        row = {"test": item.nodeid, "outcome": report.outcome, "when": report.when, "why": _why(report)}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return report


def _why(report) -> str:
    if hasattr(report, "wasxfail"):
        return report.wasxfail
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")


def pytest_sessionfinish(session):
    if path := os.environ.get("MASKED_LAUNCHES"):
        launches.write(path)
