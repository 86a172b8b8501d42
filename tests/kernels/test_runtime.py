"""Kernel modules on a machine without Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from lowvram_grpo.kernels import runtime
from lowvram_grpo.kernels.grpo_loss import fused_grpo_loss
from lowvram_grpo.objective import Objective
assert not runtime.HAS_TRITON and not runtime.interpreted()
x, a = torch.zeros(2, 3), torch.zeros(2)
assert fused_grpo_loss(*[y.to("meta") for y in (x, x, x, a, x, x)], Objective()).coefficient.shape == (2, 3)
try:
    fused_grpo_loss(x, x, x, a, x, x, Objective())
except RuntimeError as error:
    print(error)
"""


def test_modules_import_and_say_what_is_missing():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "The fused GRPO loss needs Triton, which is not installed here; use objective.grpo_loss." in done.stdout


@pytest.mark.parametrize("cores", [24, 28, 30, 34, 46, 132])
@pytest.mark.parametrize("rows,block", [(2048, 64), (1470, 32), (300, 64), (17, 64)])
def test_launches_fill_the_last_wave(cores, rows, block):
    from lowvram_grpo.kernels.sweep.launch import whole_waves

    blocks = -(-rows // block)
    splits = whole_waves(blocks, 1187, cores)
    waves = -(-blocks * splits // cores)
    assert blocks * splits / (waves * cores) > 0.9
    assert whole_waves(blocks, 1, cores) == 1
