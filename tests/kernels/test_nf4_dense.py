"""bitsandbytes' NF4 weights made dense in one launch: bitsandbytes' own bits."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from lowvram_grpo.kernels.layer.nf4_dense import dense_nf4, fits
from lowvram_grpo.kernels.runtime import HAS_TRITON, interpreted

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed on this platform")

DEVICE = torch.device("cpu" if interpreted() else "cuda")


def quantized(shape, dtype=torch.float32, nested=True, **settings):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    weight.flatten()[5 : 5 + 64] = 0  # a block that ends within others, and one whose scale is tiny
    weight.flatten()[64:128] *= 1e-4
    return quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, **{"blocksize": 64, **settings})


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128), (67, 192), (260, 64)])
def test_the_bits_are_those_of_bitsandbytes(shape, dtype, nested):
    packed, state = quantized(shape, dtype, nested)
    assert fits(packed, state)
    found, expected = dense_nf4(packed, state, dtype), dequantize_4bit(packed, state)
    assert found.shape == shape and found.dtype == dtype
    if dtype == torch.bfloat16 and interpreted():  # which truncates
        exact = dense_nf4(packed, state, torch.float32)
        expected = (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert torch.equal(found, expected)


def test_what_is_quantized_in_another_way_does_not_fit():
    packed, state = quantized((8, 256), blocksize=128)
    assert not fits(packed, state)
    packed, state = quantize_4bit(torch.randn(8, 64, device=DEVICE), quant_type="fp4", blocksize=64)
    assert not fits(packed, state)
    packed, state = quantized((8, 64))
    assert fits(packed, state) and not fits(packed.float(), state) and not fits(packed[:7], state)
    with pytest.raises(ValueError, match="float64"):
        dense_nf4(packed, state, torch.float64)
