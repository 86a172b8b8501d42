"""Every kernel compiles for every card we promise, in the shared memory it has and without spilling."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from lowvram_grpo.kernels.runtime import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")

_spec = importlib.util.spec_from_file_location("lowvram_gate", Path(__file__).with_name("gate.py"))
gate = importlib.util.module_from_spec(_spec)
sys.modules["lowvram_gate"] = gate
_spec.loader.exec_module(gate)

SPILLING = """
import json, sys
sys.path.insert(0, {folder!r})
import gate
from lowvram_grpo.kernels.grpo_loss_kernel import compile_cases
case = compile_cases(80)[-1]
args = (case.kernel, case.signature, case.constexprs, 80)
kept = gate.compile_for(*args, case.num_warps)
pressed = gate.compile_for(*args, case.num_warps, maxnreg=24)
print(json.dumps([kept.spills, pressed.spills, pressed.registers]))
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("--subset",), id="subset"),
        pytest.param((), id="all", marks=[pytest.mark.full, pytest.mark.every_case]),
    ],
)
def compiled(request):
    return gate.run(*request.param)


def test_every_kernel_module_is_there(compiled):
    assert {found["module"] for found in compiled} == set(gate.modules()) >= {"grpo_loss_kernel"}
    assert {found["cc"] for found in compiled} == set(gate.SHARED_LIMIT)


def test_every_case_compiles_within_the_card(compiled):
    wrong = [
        found
        for found in compiled
        if "error" in found or found["shared_bytes"] > gate.SHARED_LIMIT[found["cc"]] or found["spills"]
    ]
    assert not wrong, wrong[:5]


def test_the_gate_sees_spills(tmp_path):
    """A kernel that is given too few registers spills, and the gate says so."""
    script = tmp_path / "press.py"
    script.write_text(SPILLING.format(folder=str(Path(__file__).parent)))
    environment = gate.environment() | {"LOWVRAM_GATE_CACHE": ""}  # what was measured once is measured now
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    kept, pressed, registers = json.loads(done.stdout)
    assert kept == 0 and pressed > 0 and registers <= 24
