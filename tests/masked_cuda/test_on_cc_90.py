"""On the mask of an H100 (9.0), in full: all of tests/gpu, and decode steps."""

from __future__ import annotations

import pytest

from tests.masked_cuda.outside import functions, masked, skip_unless_possible
from tests.masked_cuda.record import ROOT

pytestmark = [skip_unless_possible(), pytest.mark.full]
GPU = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/gpu/test_*.py"))
INSIDE = functions([*GPU, "tests/masked_cuda/check_rollouts.py", "tests/masked_cuda/check_hybrids.py"])
there, test_on_the_mask, test_every_launch_is_a_case_of_the_compile_gate, _ = masked("9.0", INSIDE)
