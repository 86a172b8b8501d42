"""On the mask of a consumer card (8.6): tests/gpu, the trainer, counts."""

from __future__ import annotations

from tests.masked_cuda.outside import functions, masked, skip_unless_possible

pytestmark = skip_unless_possible()
INSIDE = functions(
    [
        "tests/masked_cuda/check_baseline.py",
        "tests/masked_cuda/check_trainer.py",
        "tests/masked_cuda/check_streamed_reference.py",
        "tests/masked_cuda/check_streamed_weights.py",
    ]
)
there, test_on_the_mask, test_every_launch_is_a_case_of_the_compile_gate, test_all_cases_on_the_mask = masked(
    "8.6", INSIDE
)
