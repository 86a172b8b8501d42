"""On the mask of Turing (7.5): float16 with a GradScaler, kernels without tensor cores, the commands."""

from __future__ import annotations

from tests.masked_cuda.outside import functions, masked, skip_unless_possible

pytestmark = skip_unless_possible()
INSIDE = [
    *functions(["tests/masked_cuda/check_commands.py"]),
    "tests/gpu/test_decode_on_device.py::test_one_graph_serves_every_step",
    "tests/gpu/test_kernels_on_device.py::test_dense_no_worse_than_eager",
    "tests/gpu/test_kernels_on_device.py::test_a_quantized_head_equals_its_own_dequantized_weights",
    "tests/gpu/test_training_on_device.py::test_a_step_under_fp16_with_a_grad_scaler",
    "tests/masked_cuda/check_trainer.py::test_a_preset_trains_in_16_bits[8gb]",
]
# The others run on 9.0.
FULL = [
    *functions(["tests/gpu/test_decode_on_device.py", "tests/gpu/test_kernels_on_device.py"]),
    *functions(["tests/gpu/test_training_on_device.py"]),
]
there, test_on_the_mask, test_every_launch_is_a_case_of_the_compile_gate, test_all_cases_on_the_mask = masked(
    "7.5", INSIDE, FULL
)
