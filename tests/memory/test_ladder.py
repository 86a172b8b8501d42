"""What counts as a saving on the ladder."""

from __future__ import annotations

import pytest

from lowvram_grpo.memory.ladder import saves


@pytest.mark.parametrize(
    "key,value,current,answer",
    [
        ("mlp_tile", "512", None, True),
        ("mlp_tile", "512", 256, False),
        ("mlp_tile", "512", 512, False),
        ("rollout_batch_size", 8, "16", True),
        ("activation_offload", "true", False, True),
        ("activation_offload", "true", None, True),
        ("activation_offload", True, True, False),
        ("activation_offload", "false", True, False),
        ("quantization", "nf4", "none", True),
        ("quantization", "nf4", None, True),
        ("head_dtype", "int8", "nf4", False),
    ],
)
def test_what_saves_memory(key, value, current, answer):
    assert saves(key, value, current) is answer
