"""Decode attention compiled, and captured in a CUDA graph that serves steps of other sizes.

TRITON_INTERPRET=0 python -m pytest tests/gpu
"""

from __future__ import annotations

import os

import pytest
import torch
from decode_problems import RAGGED, Problem, assert_no_worse
from lowvram_grpo.kernels.decode.attention import decode_attention
from lowvram_grpo.kernels.decode.kv import KV
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

pytestmark = [
    pytest.mark.skipif(not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"),
    pytest.mark.skipif(interpreted(), reason="needs compiled kernels: set TRITON_INTERPRET=0"),
]
LONG = {"counts": [1, 16, 7], "prefixes": [131, 2000, 77], "ages": [300, 3, 127, 128, 999, 0]}
if "MASKED_CC" in os.environ:  # tests/masked_cuda: a CPU computes
    LONG = {"counts": [1, 9, 2], "prefixes": [131, 500, 77], "ages": [200, 3, 127, 128, 0]}
# Triton compiles no bfloat16 for Turing, and the project computes in float16 there.
TURING = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
DTYPES = [*([] if TURING else [torch.bfloat16]), torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rep,d", [(7, 64), (4, 128), (6, 80), (2, 256), (1, 96)])
@pytest.mark.parametrize("sizes", [RAGGED, LONG], ids=["ragged", "long"])
def test_compiled_kernels_against_float64(sizes, rep, d, dtype):
    for int8 in (False, True):
        for masks in ({}, {"window": 200}, {"window": 25, "softcap": 3.0}):
            assert_no_worse(Problem(**sizes, rep=rep, d=d, dtype=dtype, int8=int8, dead=2).errors(**masks), dtype)


@pytest.mark.parametrize("int8", [False, True])
def test_one_graph_serves_every_step(int8):
    problem = Problem([5, 3], [40, 700], [0, 3], rep=7, d=64, int8=int8, longest_own=400)
    rows = problem.rows
    to = lambda x: None if x is None else x.clone().cuda()
    for name in ("slot", "age", "prefix", "members", "rank"):
        setattr(rows, name, to(getattr(rows, name)))
    tensors = [to(x) for x in (problem.query, problem.key, problem.value)]
    prompts, own, theirs = (KV(*map(to, x)) for x in (problem.prompts, problem.own, problem.own))
    step = lambda own=own: decode_attention(*tensors, prompts, own, rows, scale=0.2, window=90)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(KV(*map(to, problem.own)))  # compiles, and writes its token where nobody looks
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for age, before in ((0, 700), (1, 700), (150, 650), (399, 1)):
        rows.age.copy_(torch.arange(8) % 2 + age - age % 2)
        rows.prefix.copy_(torch.tensor([40, before]))
        for x in tensors:
            x.normal_()
        rows.longest_own, rows.longest_prefix = int(rows.age.max()) + 1, max(40, before)
        rows._masks.clear()
        graph.replay()
        expected = decode_attention(*tensors, prompts, theirs, rows, scale=0.2, window=90, path="torch")
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
        assert all(a is None or torch.equal(a, b) for a, b in zip(own, theirs))
