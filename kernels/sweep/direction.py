"""The gradient to the hidden states from short lists of vocabulary entries.

With c = dL/dlogp and e = dL/dKL of a row, p its probabilities and d its log-ratios to the reference (`fold.py`):

    dL/dh = scale / T * [ c (W_t - sum_v p_v W_v) + e sum_v p_v (d_v - E[d]) W_v ]

Both sums are dominated by the few v on the row's list; the mass of the rest is known exactly and put on the mean row of
W. With `coef` p_k (and -1 for the target itself), `kl_coef` p_k (d_k - E[d]) over the list and tails 1 - sum p_k and
-sum kl_coef_k (both sums over all v are known: 1 and 0), that is

    sum_k (e kl_coef_k - c coef_k) W[v_k] + (e kl_tail - c tail) mean(W)

so a row costs its list's length times H. Dropping a tail is wrong by at most tail * max_v |W_v - mean(W)|.

Memory: the result (N, H); a head that is quantized or elsewhere adds one buffer of dequantized rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from lowvram_grpo.kernels.head import Head
from lowvram_grpo.kernels.runtime import CompileCase, compile_case, jit, tl
from torch import Tensor

_BLOCK_H, _BLOCK_ENTRIES = 128, 16


class Entries(NamedTuple):
    """Lists of N rows, one after the other.

    Attributes:
        offsets: (N + 1,) int64, where each row's entries begin.
        ids: (K,) int32 vocabulary entries.
        coef, kl_coef: (K,) float32; kl_coef is empty where no gradient goes through the KL.
        tail, kl_tail: (N,) float32 mass that is not on the list; kl_tail is empty like kl_coef.
    """

    offsets: Tensor
    ids: Tensor
    coef: Tensor
    kl_coef: Tensor
    tail: Tensor
    kl_tail: Tensor


@jit
def _direction_kernel(
    w_ptr, offsets_ptr, ids_ptr, coef_ptr, kl_coef_ptr, tail_ptr, kl_tail_ptr, grad_logps_ptr, grad_kl_ptr, mean_ptr,
    out_ptr, width, w_stride, factor, DIRECT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < width
    c = tl.load(grad_logps_ptr + row)
    live = c != 0
    tail = -c * tl.load(tail_ptr + row)
    if grad_kl_ptr is not None:
        e = tl.load(grad_kl_ptr + row)
        live = live | (e != 0)
        tail += e * tl.load(kl_tail_ptr + row)
    total = tl.zeros([BLOCK_H], tl.float32)
    if live:
        first = tl.load(offsets_ptr + row)
        last = tl.load(offsets_ptr + row + 1)
        k0 = first
        while k0 < last:
            k = k0 + tl.arange(0, BLOCK_K)
            present = k < last
            weight = -c * tl.load(coef_ptr + k, mask=present, other=0.0)
            if grad_kl_ptr is not None:
                weight += e * tl.load(kl_coef_ptr + k, mask=present, other=0.0)
            source = k.to(tl.int64) if DIRECT else tl.load(ids_ptr + k, mask=present, other=0).to(tl.int64)
            read = present[:, None] & inside[None, :]
            w = tl.load(w_ptr + source[:, None] * w_stride + column[None, :], mask=read, other=0.0)
            total += tl.sum(weight[:, None] * w.to(tl.float32), 0)
            k0 += BLOCK_K
        total += tail * tl.load(mean_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * width + column, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)


def _launch(
    w: Tensor, entries: Entries, grad_logps: Tensor, grad_kl: Tensor | None, mean: Tensor, factor: float, out: Tensor,
    direct: bool,
) -> None:  # fmt: skip
    """Rows of `out` (n, H); `direct`: row k of `w` belongs to entry k."""
    n, width = out.shape
    if not n:
        return
    grid = (n, -(-width // _BLOCK_H))
    _direction_kernel[grid](
        w, entries.offsets, entries.ids, entries.coef, entries.kl_coef, entries.tail, entries.kl_tail, grad_logps,
        grad_kl, mean, out, width, w.stride(0), factor, DIRECT=direct, BLOCK_H=_BLOCK_H, BLOCK_K=_BLOCK_ENTRIES,
        num_warps=4,
    )  # fmt: skip


def _torch(
    w: Tensor, entries: Entries, grad_logps: Tensor, grad_kl: Tensor | None, mean: Tensor, factor: float, out: Tensor
) -> None:  # fmt: skip
    """As `_launch` with `direct`, for w (k, H) of any dtype."""
    rows = torch.arange(len(out), device=out.device)
    owner = torch.repeat_interleave(rows, entries.offsets.diff(), output_size=len(entries.ids))
    weight = -grad_logps[owner] * entries.coef
    tail = -grad_logps * entries.tail
    if grad_kl is not None:
        weight += grad_kl[owner] * entries.kl_coef
        tail += grad_kl * entries.kl_tail
    total = tail[:, None] * mean
    out.copy_(total.index_add_(0, owner, w.float() * weight[:, None]).mul_(factor))


def _cut(entries: Entries, r0: int, r1: int, k0: int, k1: int) -> Entries:
    part = lambda x, a, b: x[a:b] if x.numel() else x
    return Entries(
        entries.offsets[r0 : r1 + 1] - k0,
        entries.ids[k0:k1],
        entries.coef[k0:k1],
        part(entries.kl_coef, k0, k1),
        entries.tail[r0:r1],
        part(entries.kl_tail, r0, r1),
    )


def sparse_direction(
    head: Head,
    entries: Entries,
    grad_logps: Tensor,  # (N,) float32
    grad_kl: Tensor | None,  # (N,) float32
    mean: Tensor,  # (H,) float32; zeros put no tail anywhere
    factor: float,
    dtype: torch.dtype,
    *,
    use_triton: bool,
    workspace_mib: int = 64,
    ends: list[int] | None = None,
) -> Tensor:
    """dL/dh (N, H) of `dtype` for rows with lists; rows whose list and tail are empty get 0. `ends`: the entries'
    offsets, where the host knows them; otherwise it may have to wait for them."""
    n, width = len(grad_logps), head.shape[1]
    out = torch.empty(n, width, dtype=dtype, device=grad_logps.device)
    if out.is_meta:
        return out
    if use_triton and head.dense and head.weight.device == out.device:
        _launch(head.weight.detach(), entries, grad_logps, grad_kl, mean, factor, out, direct=False)
        return out
    # Entries whose rows fit the workspace, together with float32 copies of them and of their owners' results.
    budget = max(1, workspace_mib * 2**20 // (12 * width))
    ends = entries.offsets.tolist() if ends is None else ends
    r0 = 0
    while r0 < n:
        r1 = r0 + 1
        while r1 < n and ends[r1 + 1] - ends[r0] + (r1 + 1 - r0) <= budget:
            r1 += 1
        cut = _cut(entries, r0, r1, ends[r0], ends[r1])
        grads = grad_logps[r0:r1], None if grad_kl is None else grad_kl[r0:r1]
        given = cut, *grads, mean, factor, out[r0:r1]
        if use_triton:
            _launch(head.rows(cut.ids, dtype), *given, direct=True)
        else:
            _torch(head.rows(cut.ids, torch.float32 if out.device.type == "cpu" else dtype), *given)
        r0 = r1
    return out


def compile_cases(cc: int) -> list[CompileCase]:
    """Every specialization that `sparse_direction` can launch on compute capability `cc`."""
    cases = []
    for kl in (False, True):
        for direct in (False, True):
            for dtype in ("fp16", "fp32") if cc < 80 else ("bf16", "fp16", "fp32"):
                types = {
                    "w_ptr": f"*{dtype}:16", "offsets_ptr": "*i64:16", "ids_ptr": "*i32:16", "coef_ptr": "*fp32:16",
                    "kl_coef_ptr": "*fp32", "tail_ptr": "*fp32", "kl_tail_ptr": "*fp32", "grad_logps_ptr": "*fp32",
                    "grad_kl_ptr": "*fp32" if kl else None, "mean_ptr": "*fp32:16", "out_ptr": f"*{dtype}:16",
                    "width": "i32", "w_stride": "i32:16", "factor": "fp32",
                }  # fmt: skip
                constants = {"DIRECT": direct, "BLOCK_H": _BLOCK_H, "BLOCK_K": _BLOCK_ENTRIES}
                name = f"direction {dtype} kl={kl} direct={direct}"
                cases.append(compile_case(name, _direction_kernel, types, constants))
    return cases
