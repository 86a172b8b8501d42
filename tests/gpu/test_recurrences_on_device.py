"""Gated delta rules and short convolutions compiled, against float64, and a step captured in a CUDA graph.

TRITON_INTERPRET=0 python -m pytest tests/gpu
"""

from __future__ import annotations

import os

import pytest
import torch
from delta_problems import check, problem, tokens
from lowvram_grpo.kernels.recurrent import delta_triton
from lowvram_grpo.kernels.recurrent.delta_rule import gated_delta_rule
from lowvram_grpo.kernels.recurrent.delta_step import gated_delta_step, gated_delta_step_ref
from lowvram_grpo.kernels.recurrent.short_conv import causal_conv, causal_conv_ref, causal_conv_step
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

from lowvram_grpo.policy.trials import passes_trial

pytestmark = [
    pytest.mark.skipif(not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"),
    pytest.mark.skipif(interpreted(), reason="needs compiled kernels: set TRITON_INTERPRET=0"),
]
MASKED = "MASKED_CC" in os.environ  # tests/masked_cuda: a CPU computes
TURING = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
HALVES = [torch.float16] if TURING else [torch.bfloat16, torch.float16]
SHAPES = [(1, 3, 1, 1, 16, 16), (2, 333, 2, 4, 64, 48), (1, 1000, 2, 4, 128, 128)]
if MASKED:
    SHAPES = [(1, 40, 1, 2, 17, 20)]


def on_device(shape, dtype, **settings):
    given, gradients = problem(*shape, dtype=dtype, **settings)
    return [x.cuda() for x in given], [x.cuda() for x in gradients]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rule_over_sequences(shape, dtype):
    given, gradients = on_device(shape, dtype)
    assert delta_triton.fits(*given[:5]) != TURING
    eager = lambda *given: gated_delta_rule(*given, path="torch")
    # TF32 takes 11 bits of what is rounded to 8 or 11 at the end.
    check(gated_delta_rule, eager, given, gradients, slack=2e-3)


@pytest.mark.parametrize("kind", ["delta_rule", "delta_rule_grad", "delta_step", "short_conv", "short_conv_grad"])
def test_trials_are_passed(kind):
    if MASKED and kind.startswith("delta_rule"):
        pytest.skip("takes minutes of a CPU")
    assert all(passes_trial(kind, torch.device("cuda"), dtype) for dtype in (*HALVES, torch.float32))


def test_one_graph_serves_every_step_of_a_rule():
    given, _ = on_device((3, 1, 1, 2, 24, 20) if MASKED else (8, 1, 2, 4, 128, 128), HALVES[0])
    rows, state = [x[:, 0].clone() for x in given[:5]], given[5].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gated_delta_step(*rows, state.clone())  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gated_delta_step(*rows, state)
    state.copy_(given[5])
    expected = given[5].clone()
    for _ in range(3):
        for x in rows[:3]:
            x.normal_()
        graph.replay()
        found = gated_delta_step_ref(*rows, expected)
        torch.testing.assert_close(out, found, rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-4)
    exact = tokens(*(x.double() for x in given))[0]
    assert exact.isfinite().all()


@pytest.mark.parametrize("dense", ["channels", "tokens"])
def test_a_short_convolution(dense):
    x = torch.randn(2, 45, 200, device="cuda", dtype=HALVES[0]).mT
    x = (x if dense == "channels" else x.contiguous()).requires_grad_()
    weight, dy = torch.randn(200, 4, device="cuda", dtype=x.dtype), torch.randn_like(x)
    found, exact = causal_conv(x, weight, None, "silu"), causal_conv_ref(x, weight, None, "silu")
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)
    mine, theirs = (torch.autograd.grad(y, x, dy)[0] for y in (found, exact))
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=5e-2)
    with torch.no_grad():
        state, last = x[..., :4].clone(), x[..., 4].clone()
        step = causal_conv_step(last, state, weight, None, "silu")
    torch.testing.assert_close(step, causal_conv_ref(x[..., :5], weight, None, "silu")[..., 4], rtol=2e-2, atol=2e-2)
    assert torch.equal(state, x[..., 1:5])
