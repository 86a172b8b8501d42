"""On the mask of an H100 (9.0): all of tests/gpu, and decode steps."""

from __future__ import annotations

import pytest

from tests.masked_cuda.outside import functions, masked, skip_unless_possible
from tests.masked_cuda.record import ROOT

pytestmark = [skip_unless_possible(), pytest.mark.full]
GPU = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/gpu/test_*.py"))
ALL = functions([*GPU, "tests/masked_cuda/check_rollouts.py"])
# Long ones of many cases: rotary positions, soft caps and windows, learned positions; a cache in either form.
HEADS = ("7-64", "4-128", "6-80", "2-256", "1-96")
SOME = {
    "tests/gpu/test_decode_on_device.py::test_compiled_kernels_against_float64": (
        *(f"ragged-{head}-torch.{dtype}" for head in HEADS for dtype in ("bfloat16", "float16", "float32")),
        *(f"long-{head}-torch.bfloat16" for head in HEADS),
    ),
    "tests/gpu/test_rollouts_on_device.py::test_greedy_equals_the_cpus": ("Qwen3-", "Gemma2-", "GPT2-"),
    "tests/gpu/test_rollouts_on_device.py::test_graph_replay_equals_eager_steps": (
        "torch.float32-auto", "torch.bfloat16-int8",
    ),
}  # fmt: skip
INSIDE = [test for test in ALL if test not in SOME]
INSIDE += [f"{test}[{case}]" for test, cases in SOME.items() for case in cases]
there, test_on_the_mask, test_every_launch_is_a_case_of_the_compile_gate, test_all_cases_on_the_mask = masked(
    "9.0", INSIDE, ALL
)
