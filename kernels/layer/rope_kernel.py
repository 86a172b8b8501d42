"""Rotary positions in one launch, there (`ops.py`) and back (`gradients.py`)."""

from __future__ import annotations

from itertools import product

from lowvram_grpo.kernels.card import power_of_2
from lowvram_grpo.kernels.runtime import CompileCase, compile_case, device_guard, jit, tl
from torch import Tensor

_HEADS = 4  # a program rotates


def launch_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, *, back: bool) -> None:
    """Turn q and k into `q_out` and `k_out`; `back`: q and k are gradients of what has been turned, those to what was
    given are written."""
    batch, q_heads, tokens, width = q.shape
    k_heads, d = k.shape[1], cos.shape[2]
    # One table may serve all of the batch.
    tables = [(x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)) for x in (cos, sin)]
    strides = [x.stride()[:3] for x in (q, k, q_out, k_out)]
    if batch * tokens:
        with device_guard(q):
            _rope_kernel[(batch * tokens, -(-q_heads // _HEADS) - (-k_heads // _HEADS))](
                q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, d // 2, width - d,
                *strides[0], *strides[1], *tables[0], *tables[1], *strides[2], *strides[3], BACK=back,
                HEADS=_HEADS, BLOCK=power_of_2(d // 2), REST=power_of_2(width - d) if width > d else 0, num_warps=1,
            )  # fmt: skip


@jit
def _rotate(
    x_ptr, out_ptr, x_head, out_head, block, heads, half, rest, cos1, cos2, sin1, sin2,
    BACK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads `block * HEADS` and on of one token; the pointers are its first head's."""
    kind = out_ptr.dtype.element_ty
    head = (block * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (d < half)
    x1 = tl.load(x_ptr + head * x_head + d, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + head * x_head + d + half, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:  # rounded where transformers rounds
        y1 = (x1 * cos1).to(kind).to(tl.float32) - (x2 * sin1).to(kind).to(tl.float32)
        y2 = (x2 * cos2).to(kind).to(tl.float32) + (x1 * sin2).to(kind).to(tl.float32)
    tl.store(out_ptr + head * out_head + d, y1.to(kind), mask=mask)
    tl.store(out_ptr + head * out_head + d + half, y2.to(kind), mask=mask)
    if REST > 0:
        d = tl.arange(0, REST)[None, :]
        mask = (head < heads) & (d < rest)
        kept = tl.load(x_ptr + head * x_head + d + 2 * half, mask=mask, other=0.0)
        tl.store(out_ptr + head * out_head + d + 2 * half, kept.to(kind), mask=mask)


@jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, q_heads, k_heads, half, rest,
    q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch, cos_token, sin_batch, sin_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    BACK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program turns HEADS heads of one token, of q or of k; with BACK, gradients back."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    block = tl.program_id(1)
    d = tl.arange(0, BLOCK)[None, :]
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    cos1 = tl.load(cos_ptr + d, mask=d < half, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + d + half, mask=d < half, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + d, mask=d < half, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + d + half, mask=d < half, other=0.0).to(tl.float32)
    q_blocks = tl.cdiv(q_heads, HEADS)
    if block < q_blocks:
        _rotate(
            q_ptr + batch * q_batch + token * q_token, q_out_ptr + batch * q_out_batch + token * q_out_token,
            q_head, q_out_head, block, q_heads, half, rest, cos1, cos2, sin1, sin2,
            BACK, HEADS, BLOCK, REST,
        )  # fmt: skip
    else:
        _rotate(
            k_ptr + batch * k_batch + token * k_token, k_out_ptr + batch * k_out_batch + token * k_out_token,
            k_head, k_out_head, block - q_blocks, k_heads, half, rest, cos1, cos2, sin1, sin2,
            BACK, HEADS, BLOCK, REST,
        )  # fmt: skip


def compile_cases(cc: int) -> list[CompileCase]:
    """Both ways, with and without a rest that stays as it is, in the dtypes that meet, for compute capability `cc`."""
    half = "fp16" if cc < 80 else "bf16"
    dtypes = [(half, half), ("fp32", "fp32"), (half, "fp32")]
    dtypes += [("fp16", "fp16")] if half != "fp16" else []  # a model may be trained in float16 where bfloat16 exists
    cases = []
    for (x, table), (block, rest) in product(dtypes, ((128, 0), (64, 32))):
        out = "fp32" if "fp32" in (x, table) else x
        # Triton compiles anew for what is 1: the tokens of a decode step, the only head of keys.
        for ones in ((), ("tokens", "q_heads", "k_heads", "q_token", "k_token")):
            name = f"rope {x} {table} {block} + {rest} ones={bool(ones)}"
            cases.append(_case(name, x, table, out, block, rest, ones))
        cases.append(_case(f"rope back {x} {table} {block} + {rest}", out, table, x, block, rest, back=True))
    return cases


def _case(
    name: str, x: str, table: str, out: str, block: int, rest: int, ones: tuple[str, ...] = (), *, back: bool = False
) -> CompileCase:
    types = {name: f"*{x}:16" for name in ("q_ptr", "k_ptr")} | {n: f"*{table}:16" for n in ("cos_ptr", "sin_ptr")}
    types |= {name: f"*{out}:16" for name in ("q_out_ptr", "k_out_ptr")}
    types |= dict.fromkeys(("tokens", "q_heads", "k_heads", "half", "rest", "cos_batch", "cos_token"), "i32")
    types |= dict.fromkeys(("sin_batch", "sin_token"), "i32")
    places = product(("q", "k", "q_out", "k_out"), ("batch", "head", "token"))
    types |= {f"{tensor}_{place}": "i32" for tensor, place in places}
    constants = {"BACK": back, "HEADS": _HEADS, "BLOCK": block, "REST": rest, **dict.fromkeys(ones, 1)}
    return compile_case(name, _rope_kernel, types, constants, num_warps=1)
