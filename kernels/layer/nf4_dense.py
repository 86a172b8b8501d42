"""A bitsandbytes NF4 weight made dense in one launch.

bitsandbytes takes three for a weight whose scales are quantized themselves (QLoRA, arXiv:2305.14314): the scales made
float32, their offset added, the weight. A training pass does so for each weight of each layer, up to three times.

    W[i] = code[nibble i] * (codes2[absmax[i // 64]] * absmax2[i // 64 // 256] + offset)

The products and the sum are rounded one by one, so the bits are bitsandbytes' own. Memory: the dense weight.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from lowvram_grpo.kernels.quantized import BLOCK, STATISTICS_BLOCK
from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, device_guard, jit, require_triton, tl
from torch import Tensor

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

_BLOCKS = 64  # of 64 weights, a program
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(packed: Tensor, state: QuantState) -> bool:
    """Whether the kernel knows this weight: NF4 in blocks of 64, its scales in float32 or doubly quantized."""
    if not HAS_TRITON or state.quant_type != "nf4" or state.blocksize != BLOCK or packed.dtype != torch.uint8:
        return False
    whole = packed.is_contiguous() and 2 * packed.numel() == state.shape.numel() and not packed.numel() % (BLOCK // 2)
    if not state.nested:
        return whole and state.absmax.dtype == torch.float32
    inner = state.state2
    return whole and state.absmax.dtype == torch.uint8 and inner.blocksize == STATISTICS_BLOCK


def dense_nf4(packed: Tensor, state: QuantState, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight of shape `state.shape` in `dtype`, by the kernel: see `fits`.

    Args:
        packed: uint8, two codes a byte, the first in the high bits.
        out: contiguous, of that shape and dtype; fresh memory if left out.
    """
    require_triton("dense_nf4", packed, "bitsandbytes.functional.dequantize_4bit")
    if dtype not in _DTYPES:
        raise ValueError(f"a 4-bit weight is made float32, bfloat16 or float16, not {dtype}")
    out = torch.empty(state.shape, dtype=dtype, device=packed.device) if out is None else out
    inner = (state.state2.absmax, state.state2.code, state.offset) if state.nested else (None, None, None)
    blocks = out.numel() // BLOCK
    if blocks:
        with device_guard(packed):
            _dense_kernel[(-(-blocks // _BLOCKS),)](
                packed, state.absmax, state.code, *inner, out, blocks, NESTED=state.nested,
                STATISTICS=STATISTICS_BLOCK, BLOCKS=_BLOCKS, BYTES=BLOCK // 2, num_warps=4,
                enable_fp_fusion=False,  # or product and offset would be rounded once, not twice
            )  # fmt: skip
    return out


@jit
def _dense_kernel(
    packed_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr, blocks,
    NESTED: tl.constexpr, STATISTICS: tl.constexpr, BLOCKS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    if NESTED:
        small = tl.load(absmax_ptr + block, mask=there, other=0).to(tl.int32)
        coarse = tl.load(absmax2_ptr + block // STATISTICS, mask=there, other=0.0)
        scale = tl.load(code2_ptr + small) * coarse + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=there, other=0.0)
    place = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    codes = tl.load(packed_ptr + place, mask=there[:, None], other=0).to(tl.int32)
    high = tl.load(code_ptr + (codes >> 4)) * scale[:, None]
    low = tl.load(code_ptr + (codes & 15)) * scale[:, None]
    kind = out_ptr.dtype.element_ty
    place = block[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(out_ptr + place, tl.interleave(high, low).to(kind), mask=there[:, None])


def compile_cases(cc: int) -> list[CompileCase]:
    """Single and double quantization, in each dtype that a card of compute capability `cc` computes in."""
    cases = []
    for nested, dtype in product((False, True), ("fp16", "fp32") if cc < 80 else ("bf16", "fp16", "fp32")):
        types = {"packed_ptr": "*u8:16", "absmax_ptr": "*u8:16" if nested else "*fp32:16", "code_ptr": "*fp32:16"}
        types |= dict.fromkeys(("absmax2_ptr", "code2_ptr", "offset_ptr"), "*fp32:16" if nested else None)
        types |= {"out_ptr": f"*{dtype}:16", "blocks": "i32"}
        constants = {"NESTED": nested, "STATISTICS": STATISTICS_BLOCK, "BLOCKS": _BLOCKS, "BYTES": BLOCK // 2}
        cases.append(compile_case(f"nf4_dense {dtype} nested={nested}", _dense_kernel, types, constants))
    return cases
