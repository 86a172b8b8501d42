"""Dequantization of an int8 weight in one launch, at the speed of memory.

    out[i] = round_out(round_scale(code[i] * scale[i // 64]))

over a tile whose rows follow one another in memory, so that rows need not be told apart. PyTorch's own multiplication
goes through its slow path where the dtypes differ and one operand is broadcast: on an H200 it reached 0.5 TB/s of 4.1.
The roundings are PyTorch's, so both give the same bits.

Memory: the output; 3 bytes are moved a weight.
"""

from __future__ import annotations

from lowvram_grpo.kernels.runtime import HAS_TRITON, CompileCase, compile_case, device_guard, jit, tl
from torch import Tensor

BLOCK = 64  # weights that share a scale
_TILE, _WARPS = 2048, 4


def covers(codes: Tensor, scales: Tensor, out: Tensor) -> bool:
    """Whether `int8_tile` is the way to write `out`: on a GPU, whole blocks, nothing strided."""
    whole = codes.shape[1] % BLOCK == 0 and codes.numel() > 0
    together = HAS_TRITON and out.is_cuda and {codes.device, scales.device} == {out.device}
    return together and whole and all(x.is_contiguous() for x in (codes, scales, out))


def int8_tile(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Dequantize (n, H) int8 codes with (n, H / 64) scales into `out` (n, H); see `covers`."""
    count = codes.numel()
    with device_guard(out):
        _tile_kernel[(-(-count // _TILE),)](codes, scales, out, count, GROUP=BLOCK, TILE=_TILE, num_warps=_WARPS)
    return out


@jit
def _tile_kernel(codes_ptr, scales_ptr, out_ptr, count, GROUP: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < count
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + at // GROUP, mask=inside, other=0.0).to(tl.float32)
    weight = (code * scale).to(scales_ptr.dtype.element_ty)
    tl.store(out_ptr + at, weight.to(out_ptr.dtype.element_ty), mask=inside)


def compile_cases(cc: int) -> list[CompileCase]:
    """Every specialization that `int8_tile` can launch on compute capability `cc`."""
    kinds = [("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "fp16"), *((("fp16", "bf16"),) if cc >= 80 else ())]
    return [
        compile_case(
            f"int8_tile scales={scales} out={out}", _tile_kernel,
            {"codes_ptr": "*i8:16", "scales_ptr": f"*{scales}:16", "out_ptr": f"*{out}:16", "count": "i32:16"},
            {"GROUP": BLOCK, "TILE": _TILE}, _WARPS,
        )
        for scales, out in kinds
    ]  # fmt: skip
