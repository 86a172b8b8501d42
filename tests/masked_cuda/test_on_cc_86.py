"""A consumer card (8.6) on the mask: tests/gpu, rollouts, commands, a full card in every phase."""

from __future__ import annotations

from tests.masked_cuda.outside import functions, masked, skip_unless_possible

pytestmark = skip_unless_possible()
INSIDE = ["tests/masked_cuda/check_rollouts.py", "tests/masked_cuda/check_commands.py"]
there, test_on_the_mask, test_every_launch_is_a_case_of_the_compile_gate = masked("8.6", functions(INSIDE))
