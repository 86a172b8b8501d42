"""Every path on the device itself, against float64 and against what eager code in the same dtype gets wrong there.

    TRITON_INTERPRET=0 python -m pytest tests/gpu

The interpreter proves the arithmetic; that a compiled kernel does the same (masks, atomics, tensor cores, streams) is
proved here, on shapes that are multiples of nothing.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from lowvram_grpo.kernels.grpo_loss import fused_grpo_loss
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.linear_logps import linear_logps, linear_logps_ref
from lowvram_grpo.kernels.runtime import interpreted
from lowvram_grpo.kernels.sweep.launch import PATHS, launch_config
from problems import in_dtype, peaked, problem

from lowvram_grpo.objective import Objective, grpo_loss, token_weights

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(interpreted(), reason="needs compiled kernels: set TRITON_INTERPRET=0"),
]
DEVICE = torch.device("cuda")
# Triton compiles no bfloat16 for Turing, and the project computes in float16 there.
TURING = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
HALVES = [torch.float16] if TURING else [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
# tests/masked_cuda: a CPU computes, for whom a vocabulary of a tenth has to do.
MASKED = "MASKED_CC" in os.environ
SHAPES = [(1, 63, 17), (7, 1000, 33), (130, 5003, 72), (300, 50257, 256)][: 3 if MASKED else 4]
VOCABULARY = 15_187 if MASKED else 151_936


def on_device(hidden, head, targets, dtype):
    head = in_dtype(head, dtype)
    return hidden.to(DEVICE, dtype), replace(head, weight=head.weight.to(DEVICE)), targets.to(DEVICE)


def gradient(fn, hidden, head, targets, c, **kwargs):
    """(logps, d hidden) in float64."""
    hidden = hidden.detach().clone().requires_grad_()
    out = fn(hidden, head, targets, **kwargs)
    (out.logps * c.to(out.logps)).sum().backward()
    return out.logps.detach().double(), hidden.grad.double()


def skip_if_refused(path, dtype, width):
    try:
        launch_config(DEVICE, dtype, width, path=path)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,v,h", SHAPES)
def test_dense_no_worse_than_eager(path, dtype, n, v, h):
    skip_if_refused(path, dtype, h)
    hidden, head, targets = on_device(*problem(n, v, h), dtype)
    c = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = gradient(linear_logps_ref, hidden.double(), in_dtype(head, torch.float64), targets, c)
    eager = gradient(linear_logps_ref, hidden, head, targets, c)
    got = gradient(linear_logps, hidden, head, targets, c, path=path, direction="dense", workspace_mib=8)
    for name, g, p, e in zip(("logps", "d_hidden"), got, eager, exact):
        bound = 2 * (p - e).abs().max() + 4e-6 * (1 + e.abs().max())
        assert (g - e).abs().max() <= bound, (name, float((g - e).abs().max()), float(bound))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_on_a_real_vocabulary(path, dtype):
    n, v, h = 257, VOCABULARY, 128
    skip_if_refused(path, dtype, h)
    hidden, head, targets = on_device(*peaked(n, v, h), dtype)
    c = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = gradient(linear_logps_ref, hidden.double(), in_dtype(head, torch.float64), targets, c)
    eager = gradient(linear_logps_ref, hidden, head, targets, c)
    got = gradient(linear_logps, hidden, head, targets, c, path=path)
    assert (got[0] - exact[0]).abs().max() <= 2 * (eager[0] - exact[0]).abs().max() + 4e-6 * (1 + exact[0].abs().max())
    # What a list leaves out (DirectionParams.max_tail) counts against 16-bit logits, not against better ones.
    half = gradient(linear_logps_ref, *on_device(hidden, head, targets, HALVES[0]), c)[1]
    assert (got[1] - exact[1]).norm() <= 2 * torch.maximum((eager[1] - exact[1]).norm(), (half - exact[1]).norm())


@pytest.mark.parametrize("path", ["fused", "cublas"])
def test_the_same_inputs_give_the_same_bits(path):
    """The fused kernel hands out places on the lists by atomic counters."""
    skip_if_refused(path, torch.float16, 96)
    hidden, head, targets = on_device(*peaked(200, 32003, 96), torch.float16)
    c = torch.randn(200, device=DEVICE)
    once, again = (gradient(linear_logps, hidden, head, targets, c, path=path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("direction", ["auto", "dense"])
def test_reference_and_exact_kl(path, direction):
    dtype = torch.float16
    skip_if_refused(path, dtype, 80)
    hidden, head, targets = on_device(*peaked(61, 5003, 80), dtype)
    ref = hidden + 0.2 * torch.randn(hidden.shape, device=DEVICE).to(dtype)
    out = linear_logps(hidden, head, targets, ref_hidden=ref, kl=True, path=path, direction=direction)
    both = {"ref_hidden": ref.double()}
    exact = linear_logps_ref(hidden.double(), in_dtype(head, torch.float64), targets, **both)
    eager = linear_logps_ref(hidden, head, targets, ref_hidden=ref)
    for name in ("logps", "ref_logps", "kl"):
        g, p, e = (getattr(x, name).double() for x in (out, eager, exact))
        assert (g - e).abs().max() <= 2 * (p - e).abs().max() + 4e-6 * (1 + e.abs().max()), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["auto", "dense"])
@pytest.mark.parametrize("rows", [peaked, problem], ids=["listed", "diffuse"])
def test_the_gradient_of_entropy_and_kl(path, dtype, direction, rows):
    skip_if_refused(path, dtype, 80)
    hidden, head, targets = on_device(*rows(61, 5003, 80), dtype)
    ref = hidden + 0.2 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    c = torch.randn(3, 61, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def d_hidden(fn, hidden, head, ref, **kwargs):
        hidden = hidden.detach().clone().requires_grad_()
        out = fn(hidden, head, targets, ref_hidden=ref, **kwargs)
        sum((x * w.to(x)).sum() for x, w in zip((out.logps, out.entropy, out.kl), c)).backward()
        return hidden.grad.double()

    exact = d_hidden(linear_logps_ref, hidden.double(), in_dtype(head, torch.float64), ref.double())
    half, half_ref = (x.to(HALVES[0]) for x in (hidden, ref))
    eager = d_hidden(linear_logps_ref, half, in_dtype(head, HALVES[0]), half_ref)
    settings = {"kl": True, "entropy": True, "entropy_gradient": True, "path": path, "direction": direction}
    got = d_hidden(linear_logps, hidden, head, ref, workspace_mib=2, **settings)
    assert (got - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_head_equals_its_own_dequantized_weights(path, kind):
    pytest.importorskip("bitsandbytes")
    skip_if_refused(path, torch.float16, 128)
    hidden, head, targets = on_device(*peaked(65, 4999, 128), torch.float16)
    small = head.quantized(kind)
    dense = Head(small.tile(0, 4999, torch.empty(4999, 128, device=DEVICE, dtype=torch.float16))[0])
    c = torch.randn(65, device=DEVICE)
    (a, da), (b, db) = (
        gradient(linear_logps, hidden, x, targets, c, path=path, workspace_mib=2) for x in (small, dense)
    )
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (da - db).norm() <= 2e-3 * db.norm()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("direction", ["auto", "dense"])
def test_a_head_in_host_memory_equals_a_resident_one(path, pinned, direction):
    """A small workspace makes many tiles share one buffer: a copy that overtook a product would show."""
    skip_if_refused(path, torch.float16, 64)
    hidden, head, targets = on_device(*peaked(129, 20011, 64), torch.float16)
    weight = head.weight.cpu()
    streamed = Head(weight.pin_memory() if pinned else weight)
    c = torch.randn(129, device=DEVICE)
    want, got = (
        gradient(linear_logps, hidden, x, targets, c, path=path, direction=direction, workspace_mib=4)
        for x in (head, streamed)
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-4)
    assert (got[1] - want[1]).norm() <= 2e-3 * want[1].norm()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_gives_its_dtype_to_the_product_and_nothing_else(dtype):
    hidden, head, targets = on_device(*peaked(40, 3001, 64), torch.float32)
    c = torch.randn(40, device=DEVICE)
    with torch.autocast("cuda", dtype=dtype):
        logps, d = gradient(linear_logps, hidden, head, targets, c)
    plain, d_plain = gradient(linear_logps, hidden.to(dtype), in_dtype(head, dtype), targets, c)
    torch.testing.assert_close(logps, plain, rtol=1e-4, atol=1e-4)
    assert (d - d_plain).norm() <= 1e-2 * d_plain.norm()


@pytest.mark.parametrize(
    "loss_type,estimator", [*(("grpo", name) for name in ("k1", "k2", "k3", "exact")),
                            *((name, "k3") for name in ("cispo", "sapo", "vespo"))],
)  # fmt: skip
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_fused_loss(loss_type, estimator, level):
    b, t = 5, 777
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE)
    mask = torch.rand(b, t, generator=g).to(DEVICE) < 0.8
    kl = draw(b, t).square() if estimator == "exact" else None
    fixed = (draw(b, t), draw(b, t), draw(b), mask, token_weights(mask, loss_type, t))
    factor = None if loss_type == "grpo" else draw(b, t).square()
    at, found = -draw(b, t).abs(), []
    for fn, dtype in ((grpo_loss, torch.float64), (fused_grpo_loss, torch.float32), (grpo_loss, torch.float32)):
        cast = lambda x, to=dtype: x.to(to) if x is not None and x.is_floating_point() else x
        logps = cast(at).clone().requires_grad_()
        objective = Objective(kl_estimator=estimator, importance_sampling_level=level, loss_type=loss_type)
        loss = fn(logps, *map(cast, fixed), objective, kl=cast(kl), factor=cast(factor)).loss
        loss.backward()
        found.append((loss.detach().double(), logps.grad.double()))
    exact, got, eager = found
    for e, f, p in zip(exact, got, eager):
        assert (f - e).abs().max() <= 2 * (p - e).abs().max() + 2e-6 * e.abs().max()
