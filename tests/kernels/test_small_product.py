"""Sibling layers in one launch against float64, bitsandbytes' own dequantization, and one layer at a time."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels.decode import small_product as module
from lowvram_grpo.kernels.decode.small_product import (
    FourBit,
    Sibling,
    covers,
    fits,
    small_product,
    small_product_ref,
    tiles_of,
)
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

from lowvram_grpo.memory.ledger import Ledger

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")

DEVICE = torch.device("cpu" if interpreted() else "cuda")
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def layer(size, width, dtype, *, four_bit, nested=True, bias=True, rank=4, seed=0):
    """A sibling, and the weight in float64 that it stands for."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dense = randn(size, width, dtype=dtype, seed=seed + 1, scale=0.1 * (1 + seed))
    dense[0, :64] *= 20  # blocks whose scales differ
    exact, weight = dense.double(), dense
    if four_bit:
        packed, state = quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=nested)
        weight, exact = FourBit.of(packed, state), dequantize_4bit(packed, state).double()
    b = randn(size, dtype=dtype, seed=seed + 2) if bias else None
    up = randn(rank, size, dtype=dtype, seed=seed + 3) if rank else None
    return Sibling(weight, b, up), exact


def check(x, layers, z, found):
    first, ulp = 0, ULP[x.dtype]
    for (sibling, weight), out in zip(layers, found, strict=True):
        rank = 0 if sibling.up is None else len(sibling.up)
        base, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        if sibling.bias is not None:
            base, size = base + sibling.bias.double(), size + sibling.bias.double().abs()
        exact = base
        if rank:
            part = z[:, first : first + rank].double()
            exact, size = base + part @ sibling.up.double(), size + part.abs() @ sibling.up.double().abs()
        first += rank
        assert out.shape == exact.shape and out.dtype == x.dtype and out.is_contiguous()
        # The result is rounded once, that of the base layer too where there is an adapter, and sums are float32.
        allowed = ulp / 2 * (exact.abs() + base.abs() * bool(rank)) + 1e-5 * size
        if interpreted() and x.dtype == torch.bfloat16:  # which truncates, dequantized weights too
            allowed = 2 * allowed + ulp * size
        assert ((out.double() - exact).abs() <= allowed).all()


CASES = [
    # sizes, width, rows, rank, 4-bit, nested, bias
    ([40, 24, 8], 128, 3, 4, True, True, True),
    ([37], 320, 1, 16, True, False, False),
    ([50, 33], 192, 17, 5, True, True, False),
    ([130], 64, 33, 0, True, True, True),
    ([40, 24, 9], 100, 3, 4, False, None, True),
    ([66, 35], 321, 18, 33, False, None, False),
    ([19], 64, 70, 0, False, None, False),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes,width,rows,rank,four_bit,nested,bias", CASES)
def test_against_float64(sizes, width, rows, rank, four_bit, nested, bias, dtype):
    x = randn(rows, width, dtype=dtype)
    # Ranks that differ, so that columns of z must not be mixed up.
    layers = [
        layer(size, width, dtype, four_bit=four_bit, nested=nested, bias=bias, rank=rank and rank + i, seed=i)
        for i, size in enumerate(sizes)
    ]
    z = randn(rows, sum(rank + i for i in range(len(sizes))), dtype=dtype, seed=9) if rank else None
    siblings = [sibling for sibling, _ in layers]
    assert fits(dtype, width, siblings)
    check(x, layers, z, small_product(x, siblings, z))
    check(x, layers, z, small_product_ref(x, siblings, z))


@pytest.mark.parametrize("four_bit", [True, False])
def test_a_sibling_gets_the_bits_it_gets_alone(four_bit):
    x, z = randn(5, 128, dtype=torch.float16), randn(5, 12, dtype=torch.float16, seed=4)
    siblings = [layer(size, 128, torch.float16, four_bit=four_bit, seed=i)[0] for i, size in enumerate((33, 16, 7))]
    together = small_product(x, siblings, z)
    for i, sibling in enumerate(siblings):
        assert torch.equal(small_product(x, [sibling], z[:, 4 * i : 4 * i + 4])[0], together[i])
    assert all(map(torch.equal, small_product(x, siblings, z), together))


def test_rows_that_lie_apart():
    wide, z = randn(4, 300, dtype=torch.float16), randn(4, 9, dtype=torch.float16, seed=4)
    sibling, _ = layer(20, 128, torch.float16, four_bit=True)
    for x in (wide[:, 30:158], wide[:, ::2][:, :128]):
        expected = small_product(x.contiguous(), [sibling], z[:, 2:6].contiguous())
        assert torch.equal(small_product(x, [sibling], z[:, 2:6])[0], expected[0])


def test_nothing_is_written_beside_the_outputs(monkeypatch):
    kept = []

    def guarded(n, **how):
        kept.append(torch.full((n + 512,), 7.0, **how))
        return kept[-1][:n]

    x = randn(3, 64, dtype=torch.float16)
    siblings = [layer(size, 64, torch.float16, four_bit=True, rank=0, seed=i)[0] for i, size in enumerate((5, 3))]
    expected = small_product(x, siblings)
    monkeypatch.setattr(module.torch, "empty", guarded)
    found = small_product(x, siblings)
    assert all(map(torch.equal, found, expected)) and (kept[0][24:] == 7.0).all()


def test_on_meta_tensors_the_outputs_are_there_and_nothing_else():
    x = torch.empty(4, 128, dtype=torch.bfloat16, device="meta")
    siblings = [Sibling(torch.empty(size, 128, dtype=torch.bfloat16, device="meta")) for size in (256, 512)]
    assert covers(x, siblings)
    with Ledger() as ledger:
        found = small_product(x, siblings)
    assert [tuple(out.shape) for out in found] == [(4, 256), (4, 512)] and ledger.peak == 4 * 768 * 2


def test_what_does_not_fit():
    half = torch.float16
    good = layer(20, 128, half, four_bit=True)[0]
    others = [
        layer(20, 128, half, four_bit=False)[0],  # another kind of weight
        layer(20, 192, half, four_bit=True)[0],
        layer(20, 128, half, four_bit=True, nested=False)[0],
        layer(20, 128, half, four_bit=True, bias=False)[0],
        layer(20, 128, half, four_bit=True, rank=0)[0],
        good._replace(bias=good.bias.float()),
        good._replace(up=good.up.T.contiguous().T),
        good._replace(up=torch.zeros(module.WIDEST_RANK + 1, 20, dtype=half)),
    ]
    assert fits(half, 128, [good, good])
    assert not any(fits(half, 128, [good, other]) for other in others)
    assert not fits(torch.float32, 128, [good]) and not fits(half, 128, []) and not fits(half, 128, [good] * 4)
    x = torch.zeros(2, 128, dtype=half, device=DEVICE)
    assert covers(x, [good]) == (DEVICE.type == "cuda") and not covers(x[:0], [good])
    with pytest.raises(ValueError, match="fits"):
        small_product(x.float(), [good])


def test_bitsandbytes_states_that_are_not_ours():
    from bitsandbytes.functional import quantize_4bit

    for size, blocksize in ((100, 64), (128, 128)):
        packed, state = quantize_4bit(torch.randn(4, size), blocksize=blocksize, quant_type="nf4")
        assert FourBit.of(packed, state) is None
    packed, state = quantize_4bit(torch.randn(4, 128), blocksize=64, quant_type="fp4")
    assert torch.equal(FourBit.of(packed, state).code, state.code)


def test_tiles_hold_the_rows_and_give_small_layers_many_programs():
    for cc in (75, 80, 86, 89, 90, 120):
        for rows in (1, 8, 16, 17, 32, 64):
            few, many = tiles_of(cc, rows, 1152, 46), tiles_of(cc, rows, 9728, 46)
            assert few.outputs <= many.outputs and few.rows >= min(rows, 32 if cc < 80 else 64)
