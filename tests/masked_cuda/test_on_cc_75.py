"""On the mask of Turing (7.5), in full: float16 with a GradScaler, kernels without tensor cores, the commands."""

from __future__ import annotations

import pytest

from tests.masked_cuda.outside import functions, masked, skip_unless_possible

pytestmark = [skip_unless_possible(), pytest.mark.full]
INSIDE = [
    *functions(["tests/masked_cuda/check_commands.py"]),
    *functions(["tests/gpu/test_decode_on_device.py", "tests/gpu/test_kernels_on_device.py"]),
    *functions(["tests/gpu/test_training_on_device.py"]),
    "tests/masked_cuda/check_trainer.py::test_a_preset_trains_in_16_bits[8gb]",
]
there, test_on_the_mask, test_every_launch_is_a_case_of_the_compile_gate, _ = masked("7.5", INSIDE)
