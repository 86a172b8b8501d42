"""One token of the gated delta rule, and short convolutions, against the definition and transformers in float64."""

from __future__ import annotations

import inspect

import pytest
import torch
from delta_problems import DEVICE, problem, tokens
from lowvram_grpo.kernels.recurrent import delta_step, short_conv
from lowvram_grpo.kernels.recurrent.delta_step import gated_delta_step
from lowvram_grpo.kernels.recurrent.short_conv import causal_conv, causal_conv_step
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted
from transformers.models.lfm2 import modeling_lfm2

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "torch"])
def way(request, monkeypatch):
    for module in (delta_step, short_conv):
        monkeypatch.setattr(module, "uses_triton", lambda *tensors: request.param == "triton")
    return request.param


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(found, exact, dtype, roundings=2):
    """Within a few roundings of the dtype; the interpreter truncates to bfloat16."""
    unit = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    roundings *= 2 if interpreted() and dtype == torch.bfloat16 else 1
    assert (found.double() - exact.double()).abs().max() <= roundings * unit * (1 + exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 16, 16), (3, 2, 4, 20, 33), (2, 1, 2, 128, 128), (1, 1, 1, 256, 70)])
def test_a_step(shape, dtype, way):
    rows, key_heads, heads, width, v_width = shape
    given, _ = problem(rows, 1, key_heads, heads, width, v_width, dtype=dtype)
    out, after = tokens(*(x.double() for x in given))
    held = randn(rows + 1, heads, width, v_width)  # rows of a larger buffer
    held[:rows] = given[5]
    before = held[rows].clone()
    found = gated_delta_step(*(x[:, 0] for x in given[:5]), held[:rows])
    assert found.dtype == dtype and found.shape == out[:, 0].shape
    near(found, out[:, 0], dtype)
    near(held[:rows], after, torch.float32, roundings=16)
    assert torch.equal(held[rows], before)


def test_the_comparison_fails_when_the_step_is_wrong(monkeypatch):
    if not interpreted():
        pytest.skip("what was compiled is kept")
    source = inspect.getsource(delta_step._step_kernel.fn).replace("beta * (v -", "beta * (v +")
    given, _ = problem(1, 1, 1, 1, 16, 16)
    assert "v +" in source
    exact = tokens(*(x.double() for x in given))[0][:, 0]
    rows = [x[:, 0] for x in given[:5]]
    with pytest.raises(AssertionError):
        near(_step_of_source(source, rows, given[5].clone(), monkeypatch), exact, torch.float32)


def _step_of_source(source, rows, state, monkeypatch):
    """The step by a kernel of other source: Triton reads it from a file."""
    import importlib.util
    import tempfile
    from pathlib import Path

    path = Path(tempfile.mkdtemp()) / "broken_step.py"
    path.write_text("from lowvram_grpo.kernels.recurrent.delta_step import *\n"
                    "from lowvram_grpo.kernels.recurrent.delta_step import _EPS, jit, tl\n" + source)  # fmt: skip
    spec = importlib.util.spec_from_file_location("broken_step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(delta_step, "_step_kernel", module._step_kernel)
    return delta_step.gated_delta_step_triton(*rows, state)


def test_states_that_cannot_be_updated_in_place():
    given, _ = problem(2, 1, 1, 2, 8, 8)
    rows = [x[:, 0] for x in given[:5]]
    for state in (given[5].double(), given[5].mT, given[5][:1].expand(2, -1, -1, -1)):
        with pytest.raises(ValueError, match="in its place"):
            gated_delta_step(*rows, state)
    meta = [x.to("meta") for x in rows]
    assert gated_delta_step(*meta, given[5].to("meta")).shape == (2, 2, 8)


# Short convolutions


def theirs(name):
    return inspect.unwrap(getattr(modeling_lfm2, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps,act,bias", [(4, "silu", False), (3, None, True), (3, None, False), (1, "silu", True)])
@pytest.mark.parametrize("length", [1, 2, 65])
@pytest.mark.parametrize("dense", ["channels", "tokens"])
def test_a_convolution_and_its_gradient(length, taps, act, bias, dtype, dense, way):
    x, weight = randn(2, length, 70, dtype=dtype).mT, randn(70, taps, dtype=dtype, seed=1)
    x = x if dense == "channels" else x.contiguous()
    bias, dy = randn(70, 2, dtype=dtype, seed=2)[:, 0] if bias else None, randn(2, 70, length, dtype=dtype, seed=3)
    found = _with_gradient(lambda x: causal_conv(x, weight, bias, act), x, dy)
    conv = lambda x: theirs("causal_conv1d_fn")(
        x, weight.double(), None if bias is None else bias.double(), activation=act
    )
    exact = _with_gradient(conv, x.double(), dy.double())
    for mine, truth in zip(found, exact):
        assert mine.dtype == dtype and mine.shape == truth.shape
        near(mine, truth, dtype, roundings=4)
    if way == "triton":
        assert found[0].stride() == x.stride()


def _with_gradient(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "taps,kept,act,bias", [(4, 4, "silu", False), (3, 3, None, True), (4, 3, "silu", True), (2, 5, None, False)]
)
def test_a_token_of_a_convolution(taps, kept, act, bias, dtype, way):
    x, weight, state = randn(3, 70, dtype=dtype), randn(70, taps, dtype=dtype, seed=1), randn(3, 70, kept, seed=2)
    state, bias = state.to(dtype), randn(70, dtype=dtype, seed=3) if bias else None
    after, exact_bias = state.double(), None if bias is None else bias.double()
    exact = theirs("causal_conv1d_update")(x.double()[..., None], after, weight.double(), exact_bias, act)[..., 0]
    near(causal_conv_step(x, state, weight, bias, act), exact, dtype, roundings=4)
    assert torch.equal(state.double(), after)


def test_a_filter_the_other_way_round_is_seen(way):
    x, weight = randn(1, 8, 9), randn(8, 3, seed=1)
    exact = theirs("causal_conv1d_fn")(x, weight.flip(1))
    with pytest.raises(AssertionError):
        near(causal_conv(x, weight), exact, torch.float32)


def test_convolutions_on_meta_tensors():
    x, weight = torch.empty(2, 5, 8, device="meta").mT.requires_grad_(), torch.empty(8, 3, device="meta")
    y = causal_conv(x, weight, None, "silu")
    assert y.shape == x.shape == torch.autograd.grad(y, x, y)[0].shape
    assert causal_conv_step(x[..., 0], torch.empty(2, 8, 3, device="meta"), weight, None).shape == (2, 8)
