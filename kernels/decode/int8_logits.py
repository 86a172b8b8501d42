"""Logits of a decode step by an int8 head, whose codes are read once and written nowhere.

    out[n, v] = sum_h x[n, h] * round16(code[v, h] * scale[v, h // 64]) + bias[v]

By tiles (`linear_logits`) codes are read, written as 16-bit weights and read again by cuBLAS: 5 bytes a weight, here 1.
One launch, a program for a block of vocabulary rows; up to 64 hidden states share one reading of the codes.

Weights are rounded to 16 bits as `Int8Weight.read` rounds them for the sweep, which scores: what is sampled and what is
scored differ by the order of float32 sums. Exact codes times float32 scales would be nearer to float64 and further from
the scores: emulated by PyTorch in bfloat16 (float16), by 5.4e-3 (9e-4) nats on average over 512 hidden states of
SmolLM2-135M, 1.0e-3 (1.1e-4) over 128 of Qwen2.5-Coder-0.5B.

Memory: the output, N x V float32. No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lowvram_grpo.kernels.card import card, power_of_2
from lowvram_grpo.kernels.quantized import BLOCK, Int8Weight, NF4Weight
from lowvram_grpo.kernels.runtime import (
    HAS_TRITON,
    CompileCase,
    compile_case,
    device_guard,
    interpreted,
    jit,
    require_triton,
    tl,
)
from torch import Tensor

MOST_ROWS = 64  # that share one reading of the codes: above, a product by cuBLAS is worth the bytes
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_DEVICES = ("cuda", "meta")
# What is compiled for cards that are not here: (width, dtype of scales, dtype of bias).
_VARIANTS = ((896, "fp16", None), (3584, "fp16", "fp32"), (100, "fp32", "fp32"))


class HeadTiles(NamedTuple):
    """Vocabulary rows and hidden states that a program multiplies."""

    vocab: int
    rows: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """As the kernel's launch takes them."""
        return {"VOCAB": self.vocab, "ROWS": self.rows, "num_warps": self.warps, "num_stages": self.stages}


def tiles_of(cc: int, rows: int) -> HeadTiles:
    """Tiles for compute capability `cc` and so many hidden states: estimates, until
    `benchmarks/bench_decode_ops.py` has run on a card.

    Every program reads all of its hidden states' numbers, 2 bytes each, from the L2 cache: the more of them, the more
    vocabulary rows must share that.
    """
    n = min(MOST_ROWS, power_of_2(max(16, rows)))
    if cc < 80:  # no tensor cores in Triton
        return HeadTiles(32, min(32, n), 4 if n == 16 else 8, 1)
    if n == 16:
        return HeadTiles(64, 16, 4, 4)
    return HeadTiles(128, n, 8, 3)


def covers(hidden: Tensor, weight: Tensor | Int8Weight | NF4Weight) -> bool:
    """Whether `int8_logits` takes these: a few 16-bit hidden states on CUDA (or meta) beside an int8 weight."""
    if not (HAS_TRITON and isinstance(weight, Int8Weight) and hidden.dtype in _DTYPES):
        return False
    beside = hidden.device.type in _DEVICES and weight.device == hidden.device
    dense = weight.codes.is_contiguous() and weight.scales.is_contiguous()
    known = hidden.dtype == torch.float16 or card(hidden.device)[0] >= 80  # Turing has no bfloat16
    return beside and dense and len(hidden) <= MOST_ROWS and known


def int8_logits(hidden: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """`W h + b`, float32 (N, V), for float16 or bfloat16 hidden states (N, H) and a bias (V,) of any float dtype.

    On meta tensors only the output. Any N, but every 64 hidden states (32 on Turing) read the codes once more.

    Raises:
        ValueError: hidden states of another dtype, or codes or scales that are not contiguous.
        RuntimeError: no Triton, or no GPU and no interpreter.
    """
    if hidden.dtype not in _DTYPES or not (weight.codes.is_contiguous() and weight.scales.is_contiguous()):
        raise ValueError("int8_logits needs 16-bit hidden states and contiguous codes and scales; use linear_logits")
    (n, width), vocab = hidden.shape, weight.shape[0]
    out = torch.empty(n, vocab, dtype=torch.float32, device=hidden.device)
    if out.is_meta:
        return out
    require_triton("int8_logits", hidden, "linear_logits")
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    tiles = tiles_of(card(hidden.device)[0], n)
    if out.numel():
        with device_guard(hidden):
            _int8_logits_kernel[(-(-vocab // tiles.vocab), -(-n // tiles.rows))](
                hidden, weight.codes, weight.scales, bias, out, n, vocab, hidden.stride(0),
                WIDTH=width, BLOCK=BLOCK, INTERPRET=interpreted(), **tiles.constants(),
            )  # fmt: skip
    return out


@jit
def _int8_logits_kernel(
    hidden_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr, n, vocab, hidden_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr, VOCAB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: VOCAB entries of ROWS hidden states' logits."""
    v = tl.program_id(0) * VOCAB + tl.arange(0, VOCAB)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside, alive = v < vocab, row < n
    h = tl.arange(0, BLOCK)
    # Codes may be more than 2^31.
    codes = codes_ptr + v.to(tl.int64)[:, None] * WIDTH + h[None, :]
    scales = scales_ptr + v.to(tl.int64) * ((WIDTH + BLOCK - 1) // BLOCK)
    x_ptr = hidden_ptr + row.to(tl.int64)[None, :] * hidden_stride + h[:, None]
    acc = tl.zeros([VOCAB, ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        scale = tl.load(scales + first // BLOCK, mask=inside, other=0.0).to(tl.float32)
        if WIDTH % BLOCK == 0:
            w = tl.load(codes + first, mask=inside[:, None], other=0)
            x = tl.load(x_ptr + first, mask=alive[None, :], other=0.0)
        else:
            there = first + h < WIDTH
            w = tl.load(codes + first, mask=inside[:, None] & there[None, :], other=0)
            x = tl.load(x_ptr + first, mask=alive[None, :] & there[:, None], other=0.0)
        w = (w.to(tl.float32) * scale[:, None]).to(scales_ptr.dtype.element_ty).to(x.dtype)
        if INTERPRET:  # numpy has no bfloat16
            w, x = w.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = row.to(tl.int64)[None, :] * vocab + v[:, None]
    tl.store(out_ptr + at, acc, mask=inside[:, None] & alive[None, :])


def compile_cases(cc: int) -> list[CompileCase]:
    """What `int8_logits` launches on compute capability `cc`: every tile, for widths that blocks of 64 fill and one
    that they do not, with and without bias, and for a single hidden state."""
    cases = []
    for tiles in dict.fromkeys(tiles_of(cc, n) for n in (16, 32, 64)):
        cases += [_case(tiles, "fp16" if cc < 80 else "bf16", *variant) for variant in _VARIANTS]
        cases += [_case(tiles, "fp16", *_VARIANTS[0])] if cc >= 80 else []
    # Triton compiles anew for what is 1.
    cases.append(_case(tiles_of(cc, 1), "fp16", 3584, "fp16", None, n=1))
    return cases


def _case(tiles: HeadTiles, kind: str, width: int, scales: str, bias: str | None, **ones: Any) -> CompileCase:
    types: dict[str, str | None] = {
        "hidden_ptr": f"*{kind}:16", "codes_ptr": "*i8:16", "scales_ptr": f"*{scales}:16",
        "bias_ptr": f"*{bias}:16" if bias else None, "out_ptr": "*fp32:16", "n": "i32", "vocab": "i32:16",
        "hidden_stride": "i32" if width % 16 else "i32:16",
    }  # fmt: skip
    sizes = {"WIDTH": width, "BLOCK": BLOCK, "INTERPRET": False, "VOCAB": tiles.vocab, "ROWS": tiles.rows, **ones}
    name = f"int8_logits {tuple(tiles)} H={width} {kind} scales={scales} bias={bias} {ones or ''}".rstrip()
    return compile_case(name, _int8_logits_kernel, types, sizes, tiles.warps, tiles.stages)
