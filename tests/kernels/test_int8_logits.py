"""The decode step's product with an int8 head against float64 and against the product by tiles: same weights."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.decode import int8_logits as kernel
from lowvram_grpo.kernels.decode import logits as logits_module
from lowvram_grpo.kernels.decode.int8_logits import covers, int8_logits, tiles_of
from lowvram_grpo.kernels.decode.logits import linear_logits
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.quantized import Int8Weight
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

from lowvram_grpo.memory.ledger import Ledger

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")

DEVICE = torch.device("cpu" if interpreted() else "cuda")
# Of sum |x w|: the rounding of float32 sums; the interpreter truncates to bfloat16 where a GPU rounds.
NEAR = {torch.float16: 2e-6, torch.bfloat16: 2.0**-7 if interpreted() else 2e-6}


def problem(n, vocab, width, dtype=torch.bfloat16, seed=0):
    """Hidden states and an int8 weight whose blocks differ in size, inside of memory that is NaN (codes: 127)."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.full((n + 3, width + 5), torch.nan, dtype=dtype)
    hidden[:n, :width] = torch.randn(n, width, generator=g)
    sizes = torch.rand(vocab, -(-width // 64), generator=g).repeat_interleave(64, 1)[:, :width]
    weight = Int8Weight.quantize(torch.randn(vocab, width, generator=g) * sizes)
    codes = torch.full((vocab + 9, width), 127, dtype=torch.int8)
    scales = torch.full((vocab + 9, weight.scales.shape[1]), torch.nan, dtype=weight.scales.dtype)
    codes[:vocab], scales[:vocab] = weight.codes, weight.scales
    return hidden.to(DEVICE)[:n, :width], Int8Weight(codes.to(DEVICE)[:vocab], scales.to(DEVICE)[:vocab])


def exact(hidden, weight, bias=None):
    """(logits, sums of absolute values), float64, of weights rounded to 16 bits."""
    w = weight.tile(0, len(weight.codes), torch.zeros(weight.shape, dtype=hidden.dtype, device=DEVICE)).double()
    bias = torch.zeros(len(w), device=w.device) if bias is None else bias
    return hidden.double() @ w.T + bias.double(), hidden.double().abs() @ w.T.abs() + bias.double().abs()


@pytest.fixture
def guarded(monkeypatch):
    """Outputs lie between sevens, which nobody may touch; what nobody wrote is NaN."""
    empty, around = torch.empty, []

    def guarded_empty(*shape, **kwargs):
        if kwargs.get("dtype") != torch.float32 or len(shape) != 2:
            return empty(*shape, **kwargs)
        memory = torch.full((shape[0] + 130, shape[1]), 7.0, device=kwargs["device"])
        around.append((memory, shape[0]))
        return memory[65 : 65 + shape[0]].fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    yield around
    assert around and all((m[:65] == 7).all() and (m[65 + n :] == 7).all() for m, n in around)


@pytest.mark.parametrize(
    "n,vocab,width,dtype",
    [
        (1, 1, 1, torch.bfloat16), (1, 130, 192, torch.float16), (3, 67, 100, torch.bfloat16),
        (16, 64, 64, torch.float16), (17, 131, 130, torch.float16), (33, 129, 128, torch.bfloat16),
        (64, 200, 65, torch.bfloat16), (70, 40, 70, torch.float16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_no_worse_than_the_product_by_tiles(n, vocab, width, dtype, biased, guarded, monkeypatch):
    hidden, weight = problem(n, vocab, width, dtype)
    # Bias in a dtype of its own, in memory that is NaN behind it.
    bias = torch.linspace(-3, 3, vocab + 7).to(DEVICE, torch.bfloat16)
    bias[vocab:] = torch.nan
    bias = bias[:vocab] if biased else None
    right, size = exact(hidden, weight, bias)
    found = int8_logits(hidden, weight, bias)
    assert found.shape == (n, vocab) and found.dtype == torch.float32
    monkeypatch.setattr(logits_module, "compute_dtype", lambda hidden: hidden.dtype)
    tiles = linear_logits(hidden, Head(weight, bias))
    error, allowed = ((x.double() - right).abs() for x in (found, tiles))
    assert (error <= NEAR[dtype] * size).all()
    if dtype == torch.float16 or not interpreted():
        assert error.max() <= 2 * allowed.max() + 1e-6
        assert ((found - tiles).abs() <= NEAR[dtype] * size).all()


def test_scales_in_float32_and_rows_that_lie_apart():
    hidden, weight = problem(4, 70, 128, torch.float16)
    weight = Int8Weight(weight.codes, weight.scales.float() * 1.0001)
    right, size = exact(hidden, weight)
    assert ((int8_logits(hidden, weight).double() - right).abs() <= NEAR[torch.float16] * size).all()
    turned = hidden.T.contiguous().T
    assert turned.stride(1) != 1 and torch.equal(int8_logits(turned, weight), int8_logits(hidden, weight))


def test_every_tile_gives_the_same(monkeypatch):
    hidden, weight = problem(20, 90, 130, torch.float16)
    right, size = exact(hidden, weight)
    for cc, rows in ((75, 1), (75, 20), (86, 1), (86, 20), (86, 60)):
        monkeypatch.setattr(kernel, "tiles_of", lambda *_, cc=cc, rows=rows: tiles_of(cc, rows))
        assert ((int8_logits(hidden, weight).double() - right).abs() <= NEAR[torch.float16] * size).all()


def test_no_hidden_states_no_launch():
    hidden, weight = problem(0, 30, 64)
    assert int8_logits(hidden, weight).shape == (0, 30)


def test_what_it_cannot_take_is_refused():
    hidden, weight = problem(2, 30, 64)
    apart = Int8Weight(weight.codes.T.contiguous().T, weight.scales)
    for args in ((hidden.float(), weight), (hidden, apart)):
        with pytest.raises(ValueError, match="use linear_logits"):
            int8_logits(*args)


@pytest.fixture
def everywhere(monkeypatch):
    """The kernel's choice of devices widened to this one, and products in 16 bits on a CPU too."""
    monkeypatch.setattr(kernel, "_DEVICES", ("cuda", "meta", "cpu"))
    monkeypatch.setattr(logits_module, "compute_dtype", lambda hidden: hidden.dtype)


def test_logits_take_it_only_where_asked_and_covered(everywhere, monkeypatch):
    took = []

    def counted(*args):
        took.append(len(args[0]))
        return int8_logits(*args)

    monkeypatch.setattr(logits_module, "int8_logits", counted)
    hidden, weight = problem(3, 30, 64)
    head = Head(weight)
    linear_logits(hidden, head)
    linear_logits(hidden.float(), head, fused=True)
    linear_logits(hidden, Head(torch.randn(30, 64, device=DEVICE)), fused=True)
    linear_logits(problem(65, 30, 64)[0], head, fused=True)
    linear_logits(hidden, Head(Int8Weight(weight.codes.T.contiguous().T, weight.scales)), fused=True)
    assert took == []
    linear_logits(hidden, head, fused=True)
    linear_logits(problem(64, 30, 64)[0], head, fused=True)
    assert took == [3, 64]


def test_scale_and_soft_cap_follow(everywhere):
    hidden, weight = problem(3, 70, 64, torch.float16)
    head = Head(weight, torch.randn(70, device=DEVICE), logit_scale=0.3, softcap=2.0)
    fused = linear_logits(hidden, head, fused=True)
    right = 2.0 * torch.tanh(0.3 * exact(hidden, weight, head.bias)[0] / 2.0)
    torch.testing.assert_close(fused.double(), right, rtol=0, atol=1e-5)


def test_a_cpu_and_bfloat16_on_turing_are_left_to_tiles(monkeypatch):
    (hidden, weight), half = problem(3, 30, 64), torch.float16
    if DEVICE.type == "cpu":
        assert not covers(hidden, weight)
    hidden, weight = hidden.to("meta"), Int8Weight(weight.codes.to("meta"), weight.scales.to("meta"))
    for cc, bf16 in ((75, False), (80, True)):
        monkeypatch.setattr(kernel, "card", lambda _, cc=cc: (cc, 40))
        assert covers(hidden, weight) == bf16 and covers(hidden.to(half), weight)


def test_on_meta_tensors_nothing_but_the_output_is_counted():
    n, vocab, width = 16, 5_000, 128
    head = Head(Int8Weight.quantize(torch.randn(vocab, width, device="meta")))
    hidden = torch.empty(n, width, dtype=torch.bfloat16, device="meta")
    peaks = []
    for fused in (False, True):
        with Ledger() as ledger:
            ledger.ignore(hidden, *head.weight.flatten()[0])
            out = linear_logits(hidden, head, fused=fused, workspace_mib=1)
        assert out.is_meta and out.shape == (n, vocab)
        peaks.append(ledger.peak)
    assert peaks[1] == 4 * n * vocab < peaks[0]
