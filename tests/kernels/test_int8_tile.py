"""The int8 tile in one launch has PyTorch's bits, writes nothing else, and is taken where it applies alone."""

from __future__ import annotations

import pytest
import torch
from lowvram_grpo.kernels import quantized
from lowvram_grpo.kernels.int8_tile import covers, int8_tile
from lowvram_grpo.kernels.quantized import Int8Weight
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")
DEVICE = torch.device("cpu" if interpreted() else "cuda")
# The interpreter truncates to bfloat16 where a GPU rounds.
DTYPES = [torch.float16, torch.float32, *([] if interpreted() else [torch.bfloat16])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 64), (7, 192), (67, 128), (33, 896)])
def test_it_gives_the_bits_of_the_product_by_pytorch(rows, width, dtype):
    weight = Int8Weight.quantize(torch.randn(rows + 3, width, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    codes, scales = weight.codes[2 : 2 + rows], weight.scales[2 : 2 + rows]
    scales = scales.float() if dtype == torch.float32 else scales
    memory = torch.full((rows + 2, width), 7.0, dtype=dtype, device=DEVICE)
    out = memory[1 : 1 + rows].fill_(torch.nan)
    expected = torch.empty(rows, width, dtype=dtype, device=DEVICE)
    torch.mul(codes.unflatten(1, (-1, 64)), scales[..., None], out=expected.unflatten(1, (-1, 64)))
    assert torch.equal(int8_tile(codes, scales, out), expected)
    assert (memory[0] == 7).all() and (memory[-1] == 7).all()


def test_it_is_taken_on_a_gpu_for_whole_blocks_in_order(monkeypatch):
    class OnACard(torch.Tensor):
        is_cuda = True

    card = lambda x: x.as_subclass(OnACard)
    weight = Int8Weight.quantize(torch.randn(8, 128))
    out = torch.empty(8, 128, dtype=torch.float16)
    assert not covers(weight.codes, weight.scales, out)
    assert covers(weight.codes, weight.scales, card(out))
    assert not covers(weight.codes.T.contiguous().T, weight.scales, card(out))
    ragged = Int8Weight.quantize(torch.randn(8, 100))
    assert not covers(ragged.codes, ragged.scales, card(out[:, :100].contiguous()))
    taken = []
    monkeypatch.setattr(quantized, "int8_tile", lambda codes, scales, out: taken.append(codes.shape) or out)
    weight.read(weight.codes, weight.scales, card(out))
    weight.read(weight.codes, weight.scales, out)
    assert taken == [(8, 128)]
