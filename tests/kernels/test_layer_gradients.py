"""Gradients of RMSNorm, gated activation and rotary positions against float64, no worse than twice autograd's."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.layer import gradients as layer_gradients
from lowvram_grpo.kernels.layer import ops as layer_ops
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")

DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACK = {"rms_norm": "rms_norm_back", "swiglu": "swiglu_back", "rope": "rope_back"}


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    """The kernels, by the interpreter; counts their launches."""
    monkeypatch.setattr(layer_ops, "uses_triton", lambda *tensors: True)
    calls = dict.fromkeys(BACK.values(), 0)
    for name in calls:
        launch = getattr(layer_gradients, f"{name}_triton")

        def counted(*args, name=name, launch=launch):
            calls[name] += 1
            return launch(*args)

        monkeypatch.setattr(layer_gradients, f"{name}_triton", counted)
    return calls


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return found.to(DEVICE, dtype)


def gradients(function, inputs, dys):
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = function(*inputs)
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    return torch.autograd.grad(outs, inputs, [dy.to(out.dtype) for dy, out in zip(dys, outs)])


def check(ours, eager, inputs, dys, roundings=4):
    """Largest and mean error; the interpreter truncates to bfloat16."""
    found, plain = gradients(ours, inputs, dys), gradients(eager, inputs, dys)
    exact = gradients(eager, [x.double() for x in inputs], [dy.double() for dy in dys])
    for x, mine, theirs, truth in zip(inputs, found, plain, exact):
        assert mine.dtype == x.dtype and mine.shape == x.shape
        error, allowed = ((g.double() - truth).abs() for g in (mine, theirs))
        slack = 1e-6 + roundings * 2.0**-8 * (interpreted() and x.dtype == torch.bfloat16)
        assert error.max() <= 2 * allowed.max() + slack * (1 + truth.abs().max())
        assert error.mean() <= 2 * allowed.mean() + slack * (1 + truth.abs().mean())


def exact_norm(x, weight, eps, offset, early):
    if x.dtype != torch.float64:
        return layer_ops.rms_norm_ref(x, weight, eps, offset=offset, early=early)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight.double())


@pytest.mark.parametrize("offset,early", [(0.0, True), (1.0, False), (0.0, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 37), (2, 5, 3, 64), (7, 896)])
def test_a_norm(shape, dtype, offset, early, in_triton):
    x, weight = randn(*shape, dtype=dtype, scale=3.0), randn(shape[-1], dtype=dtype, seed=1)
    settings = {"eps": 1e-5, "offset": offset, "early": early}
    ours = lambda x: layer_gradients.rms_norm(x, weight, **settings)
    check(ours, lambda x: exact_norm(x, weight, **settings), [x], [randn(*shape, dtype=dtype, seed=2)])
    assert in_triton["rms_norm_back"] == 1


def test_a_norm_of_rows_with_gaps_and_of_another_dtype_than_its_weight():
    x, weight = randn(6, 50, dtype=torch.float16)[:, :37], randn(37, seed=1)
    dy = randn(37, 6, seed=2).T
    settings = {"eps": 1e-5, "offset": 0.0, "early": True}
    ours = lambda x: layer_gradients.rms_norm(x, weight, **settings)
    check(ours, lambda x: exact_norm(x, weight, **settings), [x], [dy])


@pytest.mark.parametrize("act", layer_ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1100), (2, 5, 48)])
def test_a_gated_activation(shape, dtype, act, in_triton):
    gate, up = randn(*shape, dtype=dtype, scale=3.0), randn(*shape, dtype=dtype, seed=1)
    eager = lambda g, u: layer_ops.swiglu_ref(g, u, act)
    check(lambda g, u: layer_gradients.swiglu(g, u, act), eager, [gate, up], [randn(*shape, dtype=dtype, seed=2)])
    assert in_triton["swiglu_back"] == 1


def test_a_gate_and_its_other_half_in_one_tensor():
    both = randn(5, 2 * 37, scale=2.0)
    check(
        lambda x: layer_gradients.swiglu(*x.chunk(2, -1)), lambda x: layer_ops.swiglu_ref(*x.chunk(2, -1)), [both],
        [randn(5, 37, seed=2)],
    )  # fmt: skip


@pytest.mark.parametrize("table", DTYPES[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width,d", [(64, 64), (24, 24), (20, 12)])
def test_rotary_positions(width, d, dtype, table, in_triton):
    q, k = (randn(2, 5, heads, width, dtype=dtype, seed=heads).transpose(1, 2) for heads in (6, 1))
    cos, sin = randn(1, 5, d, dtype=table, seed=7), randn(1, 5, d, dtype=table, seed=8)  # halves that differ
    dys = [randn(2, 6, 5, width, seed=9), randn(2, 1, 5, width, seed=10)]

    def eager(q, k):
        exact = [x.double() for x in (cos, sin)] if q.dtype == torch.float64 else (cos, sin)
        return layer_ops.rope_ref(q, k, *exact)

    check(lambda q, k: layer_gradients.rope(q, k, cos, sin), eager, [q, k], dys)
    assert in_triton["rope_back"] == 1


def test_gradients_of_queries_are_laid_out_as_the_queries():
    q, k = (randn(1, 5, heads, 8, seed=heads).transpose(1, 2) for heads in (4, 2))
    cos, sin = randn(1, 5, 8, seed=3), randn(1, 5, 8, seed=4)
    found = gradients(lambda q, k: layer_gradients.rope(q, k, cos, sin), [q, k], [randn(1, 4, 5, 8), randn(1, 2, 5, 8)])
    assert [g.stride() for g in found] == [q.stride(), k.stride()]


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope"])
def test_on_meta_there_are_the_outputs_alone(name, in_triton):
    x, table = torch.empty(1, 3, 4, 8, device="meta", requires_grad=True), torch.empty(1, 4, 8, device="meta")
    given = {"rms_norm": (x, table[0, 0], 1e-6), "swiglu": (x, x * 1), "rope": (x, x * 1, table, table)}[name]
    out = getattr(layer_gradients, name)(*given)
    (out if name != "rope" else out[0] + out[1]).sum().backward()
    assert x.grad.shape == x.shape and not any(in_triton.values())
