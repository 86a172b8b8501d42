"""RMSNorm, gated activation and rotary positions against float64, no worse than twice transformers' own code."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.layer import ops as layer_ops
from lowvram_grpo.kernels.layer.ops import (
    MAX_WIDTH,
    rms_norm,
    rms_norm_ref,
    rms_norm_triton,
    rope,
    rope_ref,
    rope_triton,
    swiglu,
    swiglu_ref,
    swiglu_triton,
)
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")

DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = {"llama": (0.0, True), "gemma": (1.0, False), "olmo": (0.0, False)}


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return found.to(DEVICE, dtype)


def assert_no_worse(found, eager, exact, roundings):
    """The largest error and the mean one. The interpreter truncates to bfloat16, so many times here."""
    assert found.dtype == eager.dtype and found.shape == eager.shape
    error, allowed = ((x.double() - exact).abs() for x in (found, eager))
    slack = 1e-6 + roundings * 2.0**-8 * (interpreted() and found.dtype == torch.bfloat16)
    assert error.max() <= 2 * allowed.max() + slack * exact.abs().max()
    assert error.mean() <= 2 * allowed.mean() + slack * exact.abs().mean()


def assert_same_bits(found, expected, share):
    """Equal but for roundings that the last bit of a sum or an exp tips: by one step, and rarely."""
    assert found.dtype == expected.dtype
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    apart = (found.contiguous().view(bits).long() - expected.contiguous().view(bits).long()).abs()
    small = expected.abs() < 1e-3 * expected.abs().max()  # where terms cancel a step says nothing
    assert (apart[~small] <= (4 if bits == torch.int32 else 1)).all()
    assert (apart > 0).double().mean() <= share


def exact_norm(x, weight, eps, offset):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 37), (2, 5, 3, 64), (7, 896), (2, 1000)])
def test_rms_norm(shape, dtype, kind):
    offset, early = NORMS[kind]
    x, weight = randn(*shape, dtype=dtype, scale=3.0), randn(shape[-1], dtype=dtype, seed=1)
    found = rms_norm_triton(x, weight, 1e-6, offset=offset, early=early)
    eager = rms_norm_ref(x, weight, 1e-6, offset=offset, early=early)
    assert_no_worse(found, eager, exact_norm(x, weight, 1e-6, offset), 2)
    if dtype != torch.bfloat16 or not interpreted():
        assert_same_bits(found, eager, 1.0 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("early", [True, False])
def test_rms_norm_in_two_dtypes(early):
    for a, b in ((torch.float16, torch.float32), (torch.float32, torch.float16)):
        x, weight = randn(3, 50, dtype=a), randn(50, dtype=b, seed=1)
        eager = rms_norm_ref(x, weight, 1e-6, early=early)
        assert eager.dtype == (torch.float32 if early else a)
        assert_same_bits(rms_norm_triton(x, weight, 1e-6, early=early), eager, 1.0)


def test_rms_norm_of_rows_that_lie_apart_and_of_tiny_ones():
    wide, weight = randn(4, 3, 100, scale=1e-3), randn(40, seed=1)
    for x in (wide[..., 20:60], wide[:, :, ::2][..., :40], wide[..., :40].transpose(0, 1), torch.zeros(2, 40)):
        x = x.to(DEVICE)
        found, eager = rms_norm_triton(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6)
        torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(rms_norm_triton(wide[..., :40], weight, 1e-5), rms_norm_ref(wide[..., :40], weight, 1e-6))


@pytest.mark.parametrize("act", layer_ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 37), (2, 3, 1500)])
def test_swiglu(shape, dtype, act):
    gate, up = randn(*shape, dtype=dtype, scale=4.0), randn(*shape, dtype=dtype, seed=1)
    found, eager = swiglu_triton(gate, up, act), swiglu_ref(gate, up, act)
    assert_no_worse(found, eager, swiglu_ref(gate.double(), up.double(), act), 2)
    if dtype == torch.float16:
        # Eager's 1 + tanh(y) cancels for y far below 0, and what is left of it differs.
        assert_same_bits(found, eager, 0.02 if act == "silu" else 0.1)


@pytest.mark.parametrize("act", layer_ops.ACTIVATIONS)
def test_swiglu_of_halves_of_one_product_and_of_extremes(act):
    gate, up = randn(5, 300, scale=3.0).chunk(2, -1)
    torch.testing.assert_close(swiglu_triton(gate, up, act), swiglu_ref(gate, up, act), rtol=2e-6, atol=2e-6)
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 6e4, float("nan")]], device=DEVICE)
    found = swiglu_triton(gate, torch.ones_like(gate), act)[0].tolist()
    assert found[:6] == pytest.approx([0.0, 0.0, 0.0, 0.0, 90.0, 6e4], abs=1e-30) and found[6] != found[6]


def tables(batch, tokens, d, dtype=torch.float32):
    """Independent halves: a kernel that takes the wrong one is seen."""
    return randn(batch, tokens, d, dtype=dtype, seed=3), randn(batch, tokens, d, dtype=dtype, seed=4)


@pytest.mark.parametrize("dtype,table", [*zip(DTYPES, DTYPES), (torch.float16, torch.float32)])
@pytest.mark.parametrize("heads,kv_heads,width,d", [(1, 1, 2, 2), (14, 2, 64, 64), (5, 5, 20, 20), (6, 3, 26, 12)])
def test_rope(heads, kv_heads, width, d, dtype, table):
    batch, tokens = (3, 1) if heads == 14 else (2, 3)
    q, k = (randn(batch, tokens, h, width, dtype=dtype, seed=h).transpose(1, 2) for h in (heads, kv_heads))
    cos, sin = tables(batch, tokens, d, table)
    exact = rope_ref(*(x.double() for x in (q, k, cos, sin)))
    eager = rope_ref(q, k, cos, sin)
    for x, found, slow, right in zip((q, k), rope_triton(q, k, cos, sin), eager, exact):
        assert_no_worse(found, slow, right, 3)
        assert found.stride() == torch.empty_like(x).stride()
        if dtype == torch.float16:
            assert_same_bits(found, slow, 0.0 if table == torch.float16 else 1.0)


def test_rope_with_one_table_for_all_rows_and_with_slices():
    cos, sin = tables(1, 3, 8)
    q, k = randn(2, 5, 3, 12, seed=1), randn(2, 1, 3, 12, seed=2)
    for a, b in ((q, k), (q[..., :8], k[..., 4:])):
        torch.testing.assert_close(rope_triton(a, b, cos, sin), rope_ref(a, b, cos, sin))
    expanded = cos.expand(2, -1, -1)
    torch.testing.assert_close(rope_triton(q, k, expanded, sin.expand(2, -1, -1)), rope_ref(q, k, cos, sin))


def test_elsewhere_than_on_cuda_it_is_transformers_own_code():
    x, weight = randn(2, 9).cpu(), randn(9, seed=1).cpu()
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))
    assert torch.equal(swiglu(x, x), swiglu_ref(x, x))
    q, (cos, sin) = randn(1, 2, 3, 4).cpu(), (t.cpu() for t in tables(1, 3, 4))
    assert all(map(torch.equal, rope(q, q, cos, sin), rope_ref(q, q, cos, sin)))


def test_what_the_kernels_do_not_take_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(layer_ops, "uses_triton", lambda *tensors: True)
    wide = randn(1, MAX_WIDTH + 1)
    assert torch.equal(rms_norm(wide, wide[0], 1e-6), rms_norm_ref(wide, wide[0], 1e-6))
    gate, up = randn(2, 6), randn(1, 6, seed=1)
    assert torch.equal(swiglu(gate, up), swiglu_ref(gate, up))
    cos, sin = tables(1, 3, 4)
    sparse = randn(1, 2, 3, 8)[..., ::2]
    assert all(map(torch.equal, rope(sparse, sparse, cos, sin), rope_ref(sparse, sparse, cos, sin)))


def test_on_meta_tensors_the_outputs_are_there_and_nothing_else():
    from lowvram_grpo.memory.ledger import Ledger

    x = torch.empty(4, 1, 1024, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(1024, device="meta")
    q = torch.empty(4, 1, 16, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    cos = torch.empty(4, 1, 64, device="meta")
    for call, size in (
        (lambda: rms_norm(x, weight, 1e-6), 4 * 4096),
        (lambda: rms_norm(x, weight, 1e-6, early=False), 2 * 4096),
        (lambda: swiglu(x, x), 2 * 4096),
        (lambda: rope(q, q, cos, cos), 2 * 4 * 4096),
    ):
        with Ledger() as ledger:
            found = call()
        assert ledger.peak == size, found


def test_rope_writes_its_own_heads_and_nothing_behind_them(monkeypatch):
    kept = []

    def guarded(x, cos):
        kept.append(torch.full((x.numel() + 1024,), 7.0, device=DEVICE))
        return kept[-1][: x.numel()].view(x.shape)

    monkeypatch.setattr(layer_ops, "_rotated_like", guarded)
    cos, sin = tables(1, 3, 8)
    q, k = randn(1, 5, 3, 12, seed=1), randn(1, 1, 3, 12, seed=2)
    for x, buffer in zip((q, k), (rope_triton(q, k, cos, sin), kept)[1]):
        assert (buffer[x.numel() :] == 7.0).all() and not (buffer[: x.numel()] == 7.0).any()
